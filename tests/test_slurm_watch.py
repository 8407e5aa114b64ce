"""common/slurm_watch.py: a job's state by Slurm's word, and its logs as they grow; on this machine, with tools of our own."""


import pytest

from backends import Status
from backends.common import slurm_watch
from backends.common.ssh import Host
from runs import Run
from transport import Refusal


@pytest.mark.parametrize("text, status", [
    ("JobId=7 JobState=PENDING Reason=Priority Restarts=0 ExitCode=0:0", Status("waiting", "PENDING: Priority")),
    ("JobId=7 JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0", Status("running", "RUNNING, attempt 2 of 3")),
    ("JobId=7 JobState=COMPLETED Reason=None Restarts=0 ExitCode=0:0", Status("done", "COMPLETED", 0)),
    ("JobId=7 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=3:0", Status("failed", "FAILED", 3)),
    ("JobId=7 JobState=FAILED Reason=RaisedSignal:9 Restarts=0 ExitCode=0:9", Status("failed", "FAILED")),
    ("JobId=7 JobState=TIMEOUT Reason=TimeLimit Restarts=0 ExitCode=0:15 TimeLimit=00:01:00",
     Status("failed", "TIMEOUT: it reached its time limit of 00:01:00")),
    ("JobId=7 JobState=CANCELLED Reason=DependencyNeverSatisfied Dependency=afterok:6(failed) Restarts=0 ExitCode=0:0",
     Status("cancelled", "CANCELLED: the stage before it did not succeed")),
    ("FAILED|3:0|04:00:00\n", Status("failed", "FAILED", 3)),
    ("CANCELLED by 1000|0:0|04:00:00\n", Status("cancelled", "CANCELLED")),
    ("", Status("failed", "the platform no longer knows it", gone=True)),
])
def test_states_are_read_from_scontrol_and_from_sacct(text: str, status: Status) -> None:
    assert slurm_watch.read_state(text, 3) == status


# ---------------------------------------------------------------- a cluster of shell scripts


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a command of Slurm's that is first on PATH."""
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % tmp_path)
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(slurm_watch, "POLL_S", 0.01)

    def make(name, body):
        path = tmp_path / name
        path.write_text("#!/bin/sh\n" + body)
        path.chmod(0o755)

    return make


def run_in(folder, nodes=1, ranks=(0,), **record):
    return Run("t23456", "fam/train", "p", "slurm", nodes, "0" * 64, ranks=list(ranks),
               record={"host": {}, "folder": str(folder), "name": "fam-train-t23456", "job": "7"} | record)


def watch(run):
    return slurm_watch.Watch(run)


def test_a_number_that_never_arrived_is_found_by_the_jobs_name(tool, tmp_path):
    tool("squeue", 'echo "$*" > %s/asked\necho 41\n' % tmp_path)
    tool("sacct", "echo 40\n")
    run = run_in(tmp_path, job="")
    assert slurm_watch.job_id(Host(), run) == run.record["job"] == "41"
    assert (tmp_path / "asked").read_text() == "-h -n fam-train-t23456 -o %i\n"
    tool("squeue", "true\n")
    tool("sacct", "true\n")
    with pytest.raises(Refusal, match="has no job of run t23456"):
        slurm_watch.job_id(Host(), run_in(tmp_path, job=""))


@pytest.mark.parametrize("text, parts, detail", [
    ("JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0", "2", "RUNNING, part 3 of at most 4"),
    ("JobState=PENDING Reason=BeginTime Restarts=2", "1", "PENDING: BeginTime, part 2 of at most 4, attempt 2 of 3"),
    ("JobState=NODE_FAIL Restarts=0", "", "NODE_FAIL: a node went down, part 1 of at most 4"),
    ("JobState=PREEMPTED Restarts=0", "", "PREEMPTED: a job of higher priority took its nodes, part 1 of at most 4")])
def test_parts_and_attempts_are_told_apart(text: str, parts: str, detail: str) -> None:
    assert slurm_watch.read_state("%s\nParts=%s\n" % (text, parts), 3, 3).detail == detail


@pytest.mark.parametrize("ends, status", [
    ({0: "rank 0 ended with exit code 0", 1: "rank 1 ended with exit code 0"},
     Status("done", "Slurm has forgotten it; by its logs, all ranks ended", 0)),
    ({0: "rank 0 ended with exit code 143", 1: "rank 1 ended with exit code 7"},
     Status("failed", "Slurm has forgotten it; by its logs, a rank failed", 7)),
    ({0: "rank 0 ended with exit code 0"},
     Status("failed", "Slurm has forgotten it; by its logs, 1 of 2 ranks ended", gone=True)),
    ({}, Status("failed", "the platform no longer knows it", gone=True))])
@pytest.mark.parametrize("sacct", ["exit 1\n", "echo 'sacct: error: Slurm accounting storage is disabled' >&2; exit 1\n",
                                   "true\n"])
def test_without_accounting_the_logs_tell_how_a_forgotten_job_ended(tool, tmp_path, ends, status, sacct, capsysbinary):
    tool("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    tool("sacct", sacct)
    for rank, line in ends.items():
        (tmp_path / ("log-x_7_%d_0.out" % rank)).write_text("hello\nairlift: %s\n" % line)
    run = run_in(tmp_path, nodes=2)
    assert watch(run).status() == status
    if ends:
        watch(run).print_all()
        assert b"hello" in capsysbinary.readouterr().out
        assert watch(run).to_the_end() == status


def test_sacct_is_asked_for_what_the_controller_has_forgotten(tool, tmp_path):
    tool("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    tool("sacct", "echo 'FAILED|3:0|04:00:00'\n")
    assert slurm_watch.ask(Host(), run_in(tmp_path)) == Status("failed", "FAILED", 3)
    tool("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1\n")
    with pytest.raises(Refusal, match="Unable to contact slurm controller") as caught:
        slurm_watch.ask(Host(), run_in(tmp_path))
    assert caught.value.code == 5


def test_logs_are_printed_as_they_grow_and_never_a_part_of_a_line(tool, tmp_path, capfdbinary):
    log = tmp_path / "log-fam_7_0_0.out"
    one = watch(run_in(tmp_path))
    assert one.print_grown() == 0  # there is none yet
    log.write_bytes(b"first\nsec")
    assert one.print_grown() > 0 and capfdbinary.readouterr().out == b"first\n"
    with open(log, "ab") as file:
        file.write(b"ond\n\xff last")
    one.print_grown()
    assert capfdbinary.readouterr().out == b"second\n" and one.print_grown() == 0
    one.print_rests()
    assert capfdbinary.readouterr().out == b"\xff last\n"
    (tmp_path / "log-fam_7_1_0.out").write_text("of rank 1\n")  # not asked for
    assert one.print_grown() == 0


def test_of_several_ranks_each_line_tells_its_own(tool, tmp_path, capfdbinary):
    for rank in (0, 1, 2):
        (tmp_path / ("log-fam_7_%d_0.out" % rank)).write_text("from %d\n" % rank)
    watch(run_in(tmp_path, 3, (0, 1, 2))).print_grown()
    assert capfdbinary.readouterr().out == b"[0] from 0\n[1] from 1\n[2] from 2\n"


def test_a_log_longer_than_one_answer_comes_whole(tool, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.setattr(slurm_watch, "MOST", 1000)
    data = b"".join(b"line %d\n" % number for number in range(2000))
    (tmp_path / "log-fam_7_0_0.out").write_bytes(data)
    tool("scontrol", "echo 'JobState=RUNNING ExitCode=0:0'\n")
    watch(run_in(tmp_path)).print_all()
    assert capfdbinary.readouterr().out == data


def test_no_log_is_said_with_the_state(tool, tmp_path):
    tool("scontrol", "echo 'JobState=PENDING Reason=Priority ExitCode=0:0'\n")
    with pytest.raises(Refusal, match=r"has no log: it is waiting \(PENDING: Priority\)"):
        watch(run_in(tmp_path)).print_all()


def test_a_job_is_followed_through_a_silent_controller_to_its_end(tool, tmp_path, capfdbinary):
    """Each state is told once; the log's end is waited for; the secrets go, and the first rank's own code counts."""
    tool("scontrol", """\
count=$(cat %(place)s/count 2>/dev/null || echo 0)
echo $((count + 1)) > %(place)s/count
case $count in
0) echo 'JobState=PENDING Reason=Resources ExitCode=0:0' ;;
1|2) echo 'JobState=RUNNING ExitCode=0:0' ;;
3) echo 'socket timed out' >&2; exit 1 ;;
*) echo 'airlift: rank 0 ended with exit code 3' > %(place)s/log-fam_7_0_0.out
   echo 'airlift: rank 1 ended with exit code 143' > %(place)s/log-fam_7_1_0.out
   echo 'JobState=FAILED ExitCode=143:0' ;;
esac
""" % {"place": tmp_path})
    (tmp_path / "secrets.json").write_text("{}")
    run = run_in(tmp_path, 2, (0, 1), secrets=True)
    assert watch(run).to_the_end() == Status("failed", "FAILED", 3)
    assert run.running_since and not (tmp_path / "secrets.json").exists()
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert [line.split(" after ")[0] for line in lines if line.startswith("-- ")] == [
        "-- waiting (PENDING: Resources)", "-- running (RUNNING)", "-- failed (FAILED)"]
    assert "[0] airlift: rank 0 ended with exit code 3" in lines


def test_a_job_that_failed_before_any_rank_shows_the_batch_scripts_log(tool, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.setattr(slurm_watch, "LATE_S", 0.05)
    tool("scontrol", "echo 'JobState=FAILED ExitCode=1:0'\n")
    (tmp_path / "sbatch_fam_7.out").write_text("srun: error: no such image\n")
    assert watch(run_in(tmp_path)).to_the_end().state == "failed"
    assert capfdbinary.readouterr().out.endswith(b"\nsrun: error: no such image\n")
