"""common/follow.py: a job of a cloud is followed to its end, whatever that is; and what pods say in their logs
(common) gives the exit code."""

import array
import json
import re
import signal
from pathlib import Path

import pytest
from cloud import EMULATED, KEEPS_ON, ON_BOTH_IN_TIME, PLATFORMS, SLOW, Begun, cloud, wait_for
from hypothesis import given
from hypothesis import strategies as st

import backends
import runs
from backends.common import follow, http

pytestmark = EMULATED


@pytest.fixture(params=PLATFORMS)
def here(request, tmp_path, monkeypatch, capsys):
    yield from cloud(request.param, tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- exit codes, and ranks that die


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_exit_code_is_the_recipes(here, nodes):
    here.recipe("import os, sys, time\nif os.environ['NODE_RANK'] != '%d': time.sleep(60)\nprint('bye')\nsys.exit(37)"
                % (nodes - 1))
    result = here.launch("--nodes", nodes)
    assert (result.code, "the job failed with exit code 37 after" in result.err) == (1, True), result.err
    assert runs.load_run(result.run).job_exit_code == 37
    assert json.loads(here.main("status", result.run, "--json").out)[0]["job_exit_code"] == 37


def test_a_failure_of_our_own_is_told_in_words(here):
    here.server.image = type(here.server.image)(hide=["bash"])
    result = here.launch()
    assert result.code == 1 and "with exit code 87" in result.err and "the image lacks" in result.err


def unpacking(pod):
    return any(Path(pod.root, "tmp").glob("airlift-*/*/code.*"))


BEFORE = {  # when a pod is killed: what the test waits for
    "before unpacking": lambda pod: pod.pid and pod.state == "Running",
    "while unpacking": lambda pod: pod.pid and unpacking(pod),
    "after unpacking": lambda pod: "up\n" in pod.output,
}


@pytest.mark.parametrize("moment", BEFORE)
@pytest.mark.parametrize(("nodes", "victim"), [(1, 0), pytest.param(2, 0, marks=SLOW), (2, 1)])
def test_a_killed_rank_ends_the_job(here, moment, nodes, victim):
    here.recipe(KEEPS_ON)
    if moment == "while unpacking":
        for number in range(2500):
            (here.root / ("src/many%02d" % (number % 40))).mkdir(exist_ok=True)
            (here.root / ("src/many%02d/f%d.py" % (number % 40, number))).write_text("x")
    begun = Begun(here, "--nodes", nodes)
    wait_for(lambda: here.jobs and len(here.job.pods) == nodes and BEFORE[moment](here.job.pods[victim]), moment)
    pod = here.job.pods[victim]
    pod.kill()
    result, took = begun.end(10)
    assert pod.wait() == 137 and ("files in" in pod.output) == (moment == "after unpacking")
    assert result.code == 1 and "the job failed, and its exit code is not known" in result.err
    silent = re.search(r"rank ([\d, ]+) ended without an exit code", result.err).group(1).split(", ")
    assert str(victim) in silent  # TERM may find the others before they can say a word, too
    assert len(here.jobs) == 1 and all(len(replica.runs) == 1 for replica in here.job.replicas)  # nothing was retried
    assert not any(pod.alive for pod in here.job.pods)
    print("ended %.1f s after the kill" % took)


def test_an_image_that_cannot_be_pulled(here):
    here.server.missing_images.add("registry.test/nemo:1")
    result = here.launch()
    assert result.code == 4 and "the image cannot be pulled: " in result.err and "ErrImagePull" in result.err
    assert "python launch.py cancel " in result.err


# ---------------------------------------------------------------- later, and from another shell


def test_detached_then_followed_from_another_shell(here):
    # On run:AI the workers are ended when the master has succeeded, so that it waits for the other one.
    here.recipe("import os, time\nrank = os.environ['NODE_RANK']\nprint('hello from', rank, flush=True)\n"
                "while not os.path.exists('/shared/go' + rank): time.sleep(0.02)\nprint('went', flush=True)\n"
                "open('/shared/go0', 'w').close()")
    begun = here.launch("--nodes", "2", "--detach")
    assert begun.code == 0 and "started; to follow it: python launch.py logs -f " + begun.run in begun.out
    wait_for(lambda: here.job.pods and all("hello" in pod.output for pod in here.job.pods))
    assert re.fullmatch(r"%s  running  \d+ s +nano3/sft  %s +2      Running" % (begun.run, here.kind),
                        here.main("status").out.splitlines()[1])
    now = here.main("logs", begun.run, "--rank", "1")  # of a job that still runs: what there is
    assert now.code == 0 and now.out.splitlines()[1:] == ["hello from 1"]
    reader = here.process("logs", "-f", begun.run, "--all-ranks")
    first = reader.stdout.readline()
    (here.volume / "go1").write_text("")
    out = first + reader.stdout.read()
    assert (reader.wait(10), reader.stderr.read()) == (0, "")
    assert {"[0] hello from 0", "[1] hello from 1", "[0] went", "[1] went"} <= set(out.splitlines())
    assert re.search(r"-- done \(Completed\) after \d+ s", out)
    again = here.main("logs", begun.run)  # a finished job's log prints and returns
    assert again.code == 0 and again.out.splitlines()[1:3] == ["hello from 0", "went"]
    assert json.loads(here.main("status", begun.run, "--json").out)[0]["state"] == "done"
    seen = len(here.server.requests)
    assert " done " in here.main("status").out and len(here.server.requests) == seen  # how it ended is remembered


@ON_BOTH_IN_TIME
def test_ctrl_c_detaches(here):
    here.recipe(KEEPS_ON)
    launcher = here.process("nano3", "sft", here.kind, "--repo-root", here.root)
    while "up\n" not in launcher.stdout.readline():
        pass
    launcher.send_signal(signal.SIGINT)
    run = runs.all_runs()[0][0].id
    assert launcher.wait(20) == 0
    assert launcher.stderr.read() == "\nthe job goes on; to follow it again: python launch.py logs -f %s\n" % run
    assert here.main("status", run).out.splitlines()[1].split()[1] == "running"


def test_a_cancelled_job_ends_the_launcher(here):
    here.recipe(KEEPS_ON)
    begun = Begun(here)
    wait_for(lambda: here.jobs and here.job.pods and "up" in here.job.pods[0].output)
    run = runs.all_runs()[0][0].id
    assert backends.backend(here.kind).cancel(runs.load_run(run)).endswith("was cancelled")
    result, _ = begun.end(10)
    assert result.code == 1 and "the job was cancelled" in result.err


def test_a_platform_that_is_out_of_reach_for_a_while_does_not_end_the_following(here):
    here.monkeypatch.setattr(http, "BACKOFF_S", 0.01)
    here.recipe("import os, time\nprint('up', flush=True)\nwhile not os.path.exists('/shared/go'): time.sleep(0.02)")
    begun = Begun(here)
    wait_for(lambda: here.jobs and here.job.pods and "up" in here.job.pods[0].output)
    here.server.fault("status", status=503, times=8, path=r"/(jobs|trainings)/[\w-]+$")
    wait_for(lambda: not here.server._faults[-1].times)
    (here.volume / "go").write_text("")
    result, _ = begun.end(20)
    assert result.code == 0 and result.out.count("trying again for 10 minutes") == 1
    here.monkeypatch.setattr(follow, "PATIENCE_S", 0)
    run = here.up()
    here.server.fault("status", status=503, times=99, path=r"/(jobs|trainings)/[\w-]+$")
    result = here.main("logs", run)
    assert result.code == 5 and "503" in result.err


# ---------------------------------------------------------------- a stream that is opened again


def shown(*streams):
    seen = array.array("q")
    return [line for stream in streams for line in follow.unseen(stream, seen)]


@pytest.mark.parametrize(("streams", "lines"), [
    (["ab", "abc"], "abc"), (["abcd", "cde"], "abcde"), (["axx", "xxy"], "axxy"), (["ab", "qr"], "abqr"),
    (["ab", "aq"], "abaq"), (["abab", "abc"], "ababc"), (["a", "a", "ab"], "ab"), (["", "a"], "a"), (["ab", "b", "bc"], "abc")])
def test_a_stream_that_begins_anew_or_at_a_later_line(streams, lines):
    """The node may have cut the log meanwhile (rotation); what was never shown is another start's, or after a gap."""
    assert "".join(shown(*streams)) == lines


@given(st.integers(1, 60), st.data())
def test_any_breaks_and_rotations_neither_repeat_nor_lose_lines(size, data):
    log = ["line %d" % number for number in range(size)]
    streams, seen = [], 0
    while seen < size:
        first = data.draw(st.integers(0, max(0, seen - 1)))
        end = data.draw(st.integers(seen + 1, size))
        streams.append(log[first:end])
        seen = end
    assert shown(*streams) == log


@ON_BOTH_IN_TIME
def test_a_progress_bar_is_seen_live(here):
    """It only moves with carriage returns, and never ends a line."""
    here.recipe("import sys, time\nfor i in range(3000):\n    sys.stderr.write('\\rstep %d of 3000' % i)\n    sys.stderr.flush()\n"
                "    time.sleep(0.02)\n")
    launcher = here.process("nano3", "sft", here.kind, "--repo-root", here.root)
    while "step 0 of 3000\n" not in launcher.stdout.readline():
        pass
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 0


def test_a_follower_whose_stream_breaks_while_the_node_cuts_the_log(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    monkeypatch.setenv("AIRLIFT_HOME", str(tmp_path))
    streams = iter(["one\ntwo\n", "one\ntwo\nthree\n", "three\nfour\n", "four\nfive\nairlift: rank 0 ended with exit code 3\n"])
    ended: list[bool] = []

    def open_log(rank: int, on: bool):
        text = next(streams, None)
        ended.extend([True] * (text is None))
        return iter([text or "airlift: rank 0 ended with exit code 3\n"])

    def ask() -> backends.Status:
        return backends.Status("failed" if ended else "running")

    run = runs.Run("t23456", "a/b", "p", "lepton", 1, "0" * 64, 0.0)
    status = follow.Follower(run, ask, open_log, lambda: "").follow()
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("--")]
    assert said == ["one", "two", "three", "four", "five", "airlift: rank 0 ended with exit code 3"]
    assert status.exit_code == 3
