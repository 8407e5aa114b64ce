"""The Slurm backend: what it refuses and what it writes, without a cluster; and, marked slow, jobs on a real one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import profiles
import transport
from backends import slurm
from backends.common import ssh
from jobs import Job
from tests import layout, support
from tests.slurm import SYSTEM_PATH, Cluster, why_not
from tests.slurm.person import Person
from transport import Refusal

# ---------------------------------------------------------------- without a cluster


def job(**settings: Any) -> Job:
    settings = profiles.defaults("slurm") | {"account": "team", "partition": "batch", "remote_job_dir": "/shared/jobs", "mounts": []} | settings
    image = settings.get("container_image")
    return Job("t23456", "fam/train", "slurm", 2, 8, 8, image, settings, support.job(nodes=2), {})


@pytest.mark.parametrize("settings, said", [
    ({"remote_job_dir": "/shared/my jobs"}, "remote_job_dir"),
    ({"remote_job_dir": "/shared/$USER"}, "remote_job_dir"),
    ({"remote_job_dir": "jobs"}, "remote_job_dir"),
    ({"remote_job_dir": "/shared/../etc"}, "remote_job_dir"),
    ({"remote_job_dir": "/shared/a:b"}, "remote_job_dir"),
    ({"remote_job_dir": "/shared/100%"}, "remote_job_dir"),
    ({"tunnel": "ssh"}, "has no host"),
    ({"tunnel": "ssh", "host": "login", "user": "me", "identity": "/nowhere/key"}, "no key"),
    ({"mounts": [{"path": "/", "mount_path": "/x"}]}, "is not a string"),
    ({"mounts": ["/data"]}, "cannot be parsed"),
    ({"mounts": ["data:/data"]}, "cannot be parsed"),
    ({"mounts": ["${auto_mount:https://host/x@main,/opt/x}"], "container_image": "i"}, "cannot be parsed"),
    ({"mounts": ["${auto_mount:git+https://host/x.git@main}"], "container_image": "i"}, "cannot be parsed"),
    ({"mounts": ["${auto_mount:git+https://host/x.git@main,/opt/x}"]}, "needs a container"),
])
def test_what_cannot_work_is_refused_before_anything_is_asked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refusal:
        slurm.check(job(**settings), support.plan(executor="slurm"))
    assert refusal.value.code == 2 and refusal.value.fix


def script_of(changed: Job, attached: bool = True) -> str:
    """The batch script that nemo-run would submit."""
    from nemo_run.core.execution.slurm import SlurmBatchRequest

    host = slurm.host_of(changed.settings)
    mounts = changed.settings["mounts"] if changed.image else []
    folder = "/shared/jobs/x"
    executor = slurm.slurm_executor(changed, host, "/shared/jobs", changed.image, mounts, folder, attached)
    executor.assign("fam-train-t23456_1", "/home/exp", "fam-train-t23456", "fam-train-t23456")
    request = SlurmBatchRequest(launch_cmd=["sbatch"], jobs=["fam-train-t23456"], command_groups=[["python3 pod.py"]],
                                executor=executor, max_retries=0, extra_env={})
    return request.materialize()


def test_the_batch_script_has_what_the_profile_asks_for() -> None:
    asked = job(container_image="registry/nemo:1", mounts=["/lustre:/lustre"], run_partition="quick", mem="0",
                batch_partition="slow", time="01:00:00", exclusive=True, cpus_per_task=12, setup_lines="module load x")
    text = script_of(asked)
    for line in ("--account=team", "--partition=quick", "--time=01:00:00", "--mem=0", "--exclusive",
                 "--cpus-per-task=12", "--gpus-per-node=8", "--nodes=2", "--ntasks-per-node=1"):
        assert "#SBATCH %s\n" % line in text, line
    assert "--container-image registry/nemo:1" in text and "/lustre:/lustre" in text
    assert "--kill-on-bad-exit=1" in text and "\nmodule load x" in text
    assert "#SBATCH --partition=slow" in script_of(asked, attached=False)
    assert "#SBATCH --partition=batch" in script_of(job()) and "--container" not in script_of(job())


def sent(tmp_path: Path, **changes: Any) -> tuple[Path, list[str]]:
    """A job's folder as it lies on the cluster, and what srun starts there."""
    files = transport.files(support.plan(executor="slurm", **changes), support.job(**changes))
    for name, data in files.items():
        layout.write(tmp_path / "job" / name, "").write_bytes(data)
    (tmp_path / "job/code").mkdir()
    return tmp_path / "job", transport.file_argv(files, str(tmp_path / "job"))


def task(tmp_path: Path, argv: list[str], **env: str) -> tuple[int, str]:
    """One task of a step, as srun starts it."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    whole = {"PATH": support.PATH, "TMPDIR": str(scratch), "SLURM_NODEID": "0"} | env
    done = subprocess.run([sys.executable, *argv[1:]], cwd=tmp_path / "job/code", capture_output=True, text=True,
                          timeout=30, env=whole)
    assert not list(scratch.glob("*/*")), "a task cleans up"
    return done.returncode, done.stdout + done.stderr


def test_a_task_unpacks_on_its_own_disk(tmp_path: Path) -> None:
    command = 'echo rank=$NODE_RANK of $NNODES at $MASTER_ADDR; cat "$AIRLIFT_CONFIG"; echo $TOKEN $NO; pwd; exit 3'
    folder, argv = sent(tmp_path, nodes=2, command=command, config='at: "/nemo_run/code/x"\n', secrets=["TOKEN"])
    (folder / "secrets.json").write_text('{"TOKEN": "s3cret", "NO": "foreign"}')
    code, said = task(tmp_path, argv, SLURM_NODEID="1", SLURM_JOB_NODELIST="n[7-8]", SLURM_JOB_ID="5",
                      MASTER_ADDR="localhost")
    assert code == 3
    place = r"%s/scratch/airlift-%d/\w{16}/code" % (re.escape(str(tmp_path)), os.geteuid())
    for line in ("rank=1 of 2 at n7", 'at: "%s/x"' % place, "s3cret", place,
                 "airlift: rank 1 ended with exit code 3"):
        assert re.search("^%s ?$" % line, said, re.MULTILINE), said


def test_what_a_killed_task_left_goes_with_the_next_one(tmp_path: Path) -> None:
    _, argv = sent(tmp_path, command="echo $AIRLIFT_CODE; echo READY; sleep 30")
    scratch = tmp_path / "scratch"
    top = scratch / ("airlift-%d" % os.geteuid())
    for name in (top.name + "/0123456789abcdef", "airlift-other", "mine"):
        layout.write(scratch / name / "code/x", "")
    top.chmod(0o700)
    env = {"PATH": support.PATH, "TMPDIR": str(scratch), "SLURM_NODEID": "0"}
    with subprocess.Popen([sys.executable, *argv[1:]], stdout=subprocess.PIPE, env=env, text=True) as first:
        assert first.stdout and "airlift: rank 0 of 1" in first.stdout.readline()
        alive = Path(first.stdout.readline().strip())
        assert list(top.iterdir()) == [alive.parent]
        with subprocess.Popen([sys.executable, *argv[1:]], stdout=subprocess.PIPE, env=env, text=True) as second:
            assert second.stdout and [second.stdout.readline() for _ in range(2)] and alive.is_dir()
            second.terminate()
        assert second.returncode == 143 and alive.is_dir()
        first.terminate()
    assert sorted(path.name for path in scratch.iterdir()) == sorted([top.name, "airlift-other", "mine"])
    assert not list(top.iterdir())


@pytest.mark.parametrize("name, code", [("pod.py", 80), ("airlift.json", 81), ("tree.tar.gz", 81)])
@pytest.mark.parametrize("how", ["changed", "longer", "gone", "fifo"])
def test_a_task_runs_nothing_but_what_was_sent(tmp_path: Path, name: str, code: int, how: str) -> None:
    folder, argv = sent(tmp_path, command="echo started")
    data = (folder / name).read_bytes()
    if how in ("changed", "longer"):
        (folder / name).write_bytes(data + b"\n" if how == "longer" else data[:-9] + b"x" + data[-8:])
    else:
        (folder / name).unlink()
    if how == "fifo" and name != "pod.py":
        os.mkfifo(folder / name)
    ended, said = task(tmp_path, argv)
    assert ended == code and "did not arrive whole" in said and "started" not in said, said
    assert re.search(r"^airlift: rank (0|\?|unknown) ended with exit code %d$" % code, said, re.MULTILINE), said


def test_strays_beside_what_was_sent_are_not_imported(tmp_path: Path) -> None:
    folder, argv = sent(tmp_path, command="echo started")
    for place in (folder, folder / "code"):
        for name in ("json", "hashlib", "tarfile"):
            (place / (name + ".py")).write_text("raise SystemExit('stray')")
    code, said = task(tmp_path, argv)
    assert code == 0 and "started" in said, said


def test_secrets_that_are_gone_are_said(tmp_path: Path) -> None:
    folder, argv = sent(tmp_path, secrets=["TOKEN"])
    code, said = task(tmp_path, argv)
    assert code == 83 and "secrets.json: No such file" in said
    (folder / "secrets.json").write_text('{"OTHER": "x"}')
    assert task(tmp_path, argv)[0] == 83


def test_two_tasks_without_a_number_are_not_both_rank_0(tmp_path: Path) -> None:
    code, said = task(tmp_path, sent(tmp_path, nodes=2)[1], SLURM_NODEID="")
    assert code == 82, said


def test_what_is_copied_is_private_and_in_no_argument_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = layout.write(tmp_path / "bin/sbatch", "#!/bin/sh\ncat >%s/script; echo 12345; env >%s/env\n" % (tmp_path, tmp_path))
    fake.chmod(0o755)
    for name, value in {"PATH": "%s:%s" % (fake.parent, os.environ["PATH"]), "HOME": str(tmp_path), "SHELL": "/bin/bash",
                        "SBATCH_PARTITION": "wrong", "HF_TOKEN": "hf_x", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    layout.write(tmp_path / ".profile", "echo noise; export HF_HOME=/here SBATCH_TIMELIMIT=1 RANK=3 OTHER='a\nRANK=b'\n")
    seen: list[Any] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: seen.append(args) or run(*args, **options))
    umask = os.umask(0)
    try:
        number = slurm.sbatch(ssh.Host(), str(tmp_path / "experiments/t/t_1"), "t", {"secrets.json": b"s3cret '\n"}, 0, "script")
    finally:
        os.umask(umask)
    folder = tmp_path / "experiments/t/t_1/t"
    assert number == "12345" and (folder / "secrets.json").read_bytes() == b"s3cret '\n"
    assert (tmp_path / "script").read_text() == "script" and "s3cret" not in repr(seen)
    for path in [tmp_path / "experiments", *(tmp_path / "experiments").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    env = (tmp_path / "env").read_text()
    assert "HF_HOME=/here" in env and "RANK=b'" not in env.splitlines()[0]
    for name in ("SBATCH_", "HF_TOKEN", "MASTER_ADDR"):
        assert name not in env, env
    assert not re.search("^RANK=3", env, re.MULTILINE)


# ---------------------------------------------------------------- a real cluster

slow = pytest.mark.slow
NO_CONTAINER, CONTAINER = "", "registry.example.com/nemo:1"
NAPPER = """
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("napping", os.environ["NODE_RANK"], flush=True)
    time.sleep(600)
    """


def wait_for(what: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def rest_of(process: "subprocess.Popen[str]") -> str:
    """What it still prints, to its end. (communicate() would lose what readline() has read ahead.)"""
    assert process.stdout
    rest = process.stdout.read()
    process.wait(30)
    return rest


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    support.need(not why_not(), why_not() or "")
    with Cluster() as made:
        yield made


@pytest.fixture(scope="session")
def people(cluster: Cluster) -> dict[str, Person]:
    made = {tunnel: Person(cluster, tunnel) for tunnel in ("ssh", "local")}
    made["local"].recipe("nap", NAPPER)
    cluster.late = made["local"].started("nap", "run.env.time=00:01:00")  # what test_a_time_limit waits for
    return made


@pytest.fixture
def laptop(people: dict[str, Person]) -> Person:
    return people["ssh"]


@pytest.fixture
def login(people: dict[str, Person]) -> Person:
    return people["local"]


@slow
@pytest.mark.parametrize(("body", "state"), [("pass", "done 0"), ("raise SystemExit(3)", "failed")])
def test_a_detached_job_notifies_by_itself(laptop: Person, body: str, state: str) -> None:
    laptop.recipe("tells", body)
    told = laptop.base / ("told-%s" % state.split()[0])
    run = laptop.started("tells", "run.env.notify='echo $AIRLIFT_RUN $AIRLIFT_STATE $AIRLIFT_EXIT_CODE >%s'" % told)
    wait_for(told.exists)
    assert wait_for(told.read_text).startswith("%s %s" % (run, state))


@slow
def test_jobs_are_adopted_by_another_home(laptop: Person) -> None:
    """Each with the digest that its pods printed; then what was changed in a folder is refused, and one launched again."""
    pick, digests = random.Random(3), {}
    for number in range(int(os.environ.get("AIRLIFT_MANY", "6"))):
        layout.write(laptop.recipes / "src/nemotron/recipes/fam/look/data.txt", "%d\n" % number + "x" * pick.randint(0, 9000))
        laptop.recipe("look", "print('looked', %d)" % number)
        run = laptop.started("look")
        digests[run] = json.loads(laptop.run("status", run, "--json").stdout)[0]["sha256"]
    for run in digests:
        laptop.until(run, "done")
        assert "sha256 " + digests[run] in laptop.log_of(run)
    other = {"AIRLIFT_HOME": str(laptop.home / "another-home")}
    listed = laptop.run("adopt", "here", env=other).stdout
    for run in digests:
        assert run in listed
        done = laptop.run("adopt", "here", run, env=other)
        assert done.returncode == 0 and digests[run] in done.stdout, done.stderr
        assert laptop.run("fetch", run, str(laptop.home / "fetched" / run), env=other).returncode == 0
    assert " done " in laptop.run("status", run, env=other).stdout
    assert "looked" in laptop.run("logs", run, env=other).stdout
    assert laptop.run("logs", run, "--download", str(laptop.home / "logs")).returncode == 0
    assert "looked" in (laptop.home / "logs/rank-0.log").read_text()
    brought = laptop.run("fetch", run, str(laptop.home / "brought"), "--outputs", "runs/%s/*.json" % run)
    assert brought.returncode == 0 and (laptop.home / "brought/runs" / run / "run.json").is_file(), brought.stderr
    again = laptop.run("again", run, env=other)
    assert again.returncode == 0 and digests[run] in again.stdout, again.stdout + again.stderr
    tree = laptop.folder_of(run) / "tree.tar.gz"
    tree.write_bytes(tree.read_bytes()[:-1])
    refused = laptop.run("adopt", "here", run, env={"AIRLIFT_HOME": str(laptop.home / "third")})
    assert refused.returncode == 2 and "are not as they were sent" in refused.stderr


@slow
def test_nano3_sft_on_two_nodes_in_a_container(laptop: Person) -> None:
    """Without one, the README's launch does it (tests/test_readme.py)."""
    done = laptop.run("nano3", "sft", "here", "--repo-root", str(layout.REPO), "--nodes", "2",
                      "train.steps=20", "run.env.container_image=" + CONTAINER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on cpu" in done.stdout and "ended with exit code 0" in done.stdout
    assert (laptop.base / "nano3/sft/model/model.safetensors").is_file()


@slow
@pytest.mark.parametrize("image", [NO_CONTAINER, CONTAINER])
def test_each_task_finds_its_own_rank_and_what_was_sent(laptop: Person, image: str) -> None:
    laptop.recipe("look", """
        import os, sys, yaml
        config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
        names = ("NODE_RANK", "NNODES", "MASTER_ADDR", "ODD")
        print("I am", *(os.environ[name] for name in names), config)
        """, "code: /nemo_run/code/x\nout: /nemo_run/y\n")
    odd = "a b; 'c' \"d\" $HOME `x` $(y) \\ %"
    done = laptop.launch("look", "--nodes", "2", "--all-ranks", "run.env.container_image=" + (image or '""'),
                         "run.env.env_vars.ODD=" + json.dumps(odd))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        code = re.search(r"\[%d\] airlift: rank .* files in (/tmp/airlift-\d+/\S+/code)" % rank, done.stdout).group(1)
        config = {"code": "%s/fam/work/x" % laptop.base, "out": "%s/fam/y" % laptop.base}
        assert "[%d] I am %d 2 n1 %s %s" % (rank, rank, odd, config) in done.stdout
        assert image or not Path(code).parent.exists()


@slow
def test_without_a_folder_jobs_go_to_the_home_on_the_cluster(laptop: Person) -> None:
    """remote_job_dir's default; the launcher's own home is another one."""
    laptop.recipe("home", """
        import os
        print("run root is", os.environ["NEMO_RUN_DIR"], os.environ["WANDB_DIR"])
        open("kept.txt", "a").write("x")
        """)
    for parts in ("x", "xx"):
        done = laptop.launch("home", "run.env.remote_job_dir=~/airlift")
        assert done.returncode == 0, done.stdout + done.stderr
        root = laptop.cluster.home / "airlift/fam"
        assert "run root is %s %s" % (root, root) in done.stdout and "outputs in ~/airlift/fam" in done.stdout
        assert "note: the job's files and outputs go to ~/airlift in your home on the cluster" in done.stdout
        assert (root / "work/kept.txt").read_text() == parts
    assert not (laptop.home / "airlift").exists()


@slow
def test_a_progress_bar_becomes_lines_in_slurms_log(login: Person) -> None:
    login.recipe("bar", """
        import sys, time
        for i in range(100):
            sys.stderr.write("\\rstep %d of 100" % i)
            sys.stderr.flush()
            time.sleep(0.02)
        """)
    done = login.launch("bar")
    assert done.returncode == 0, done.stdout + done.stderr
    bars = [line for line in done.stdout.splitlines() if "of 100" in line]
    assert bars[0] == "step 0 of 100" and bars[-1] == "step 99 of 100" and len(bars) < 4 and "\r" not in done.stdout


@slow
def test_a_rank_that_dies_ends_the_job_with_its_code(login: Person) -> None:
    login.recipe("die", """
        import os, sys, time
        if os.environ["NODE_RANK"] == "1":
            sys.exit(7)
        time.sleep(600)
        """)
    begun = time.monotonic()
    done = login.launch("die", "--nodes", "2")
    assert done.returncode == 1 and "exit code 7" in done.stderr, done.stdout + done.stderr
    assert time.monotonic() - begun < 60
    run = re.search(r", run (\w+)\n", done.stdout).group(1)
    found = login.status(run)
    assert (found["state"], found["detail"], found["job_exit_code"]) == ("failed", "FAILED", 7)


@slow
def test_another_shell_sees_reads_and_cancels_a_job(laptop: Person) -> None:
    laptop.recipe("nap", NAPPER)
    run = laptop.started("nap", "--nodes", "2")
    laptop.until(run, "running")
    wait_for(lambda: "napping 1" in laptop.log_of(run))
    reader = subprocess.Popen(laptop.cluster.laptop_command(laptop.words("logs", "-f", run, "--all-ranks")), text=True,
                              stdout=subprocess.PIPE, env=laptop.cluster.environment(str(laptop.home)))
    assert reader.stdout and reader.stdout.readline().startswith("[0] airlift: rank 0 of 2")
    done = laptop.run("cancel", run)
    assert done.returncode == 0 and re.search(r"^%s, fam/nap on \w+: job \d+ was cancelled$" % run, done.stdout,
                                              re.MULTILINE), done.stdout + done.stderr
    rest = rest_of(reader)
    assert "[1] napping 1" in rest and "rank 1 ended with exit code 143" in rest
    assert laptop.status(run)["state"] == "cancelled"
    assert "already ended" in laptop.run("cancel", run).stdout
    assert "napping 0" in laptop.run("logs", run).stdout


@slow
@pytest.mark.parametrize("words, code, said", [
    (["run.env.identity={ssh}/other"], 4, "Permission denied"),
    (["run.env.port=2223"], 5, "Connection refused"),
    (["run.env.host=192.0.2.9", "run.env.port=2222"], 5, "Connection refused"),
    (["run.env.host=localhost"], 4, "Host key verification failed"),
    (["run.env.host=nowhere.invalid"], 5, "resolve"),
    (["run.env.partition=gone"], 4, "invalid partition"),
    (["run.env.account=gone"], 4, "Invalid account"),
    (["run.env.remote_job_dir=/proc/here"], 4, "/proc/here"),
])
def test_what_the_cluster_refuses_ends_soon_and_in_its_own_words(laptop: Person, words: list[str], code: int,
                                                                 said: str) -> None:
    laptop.recipe("nap", NAPPER)
    begun = time.monotonic()
    done = laptop.launch("nap", *[word.format(ssh=laptop.home / ".ssh") for word in words])
    assert done.returncode == code and said in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 2 and time.monotonic() - begun < 20, done.stderr
    assert laptop.cluster.on_login(["squeue", "-h", "-n", "x"]).stdout == ""


@slow
def test_an_image_that_is_not_there_is_said(laptop: Person) -> None:
    laptop.recipe("nap", NAPPER)
    done = laptop.launch("nap", "run.env.container_image=registry.example.com/gone:1")
    assert done.returncode == 1 and "no such image" in done.stdout, done.stdout + done.stderr


@slow
def test_an_image_of_a_registry_is_squashed_once_on_a_node(laptop: Person) -> None:
    home = laptop.cluster.home
    enroot = layout.write(home / "bin/enroot", """\
        #!/bin/sh
        [ "$1 $2 $4" = "import -o docker://registry.example.com:5000#team/image:1" ] ||
          { echo "no image $4" >&2; exit 1; }
        sleep 3; echo "$SLURM_JOB_PARTITION $4" >>%s/squashes; echo squashed >"$3"
        """ % laptop.cluster.shared)
    enroot.chmod(0o755)
    layout.write(home / ".bashrc", "PATH=~/bin:$PATH\n")
    laptop.recipe("in", "import os; print('in', os.path.exists('/nemo_run'))")
    image = "run.env.container_image=registry.example.com"
    words = ["in", "run.env.squash_partition=interactive", image + ":5000/team/image:1"]
    (laptop.cluster.shared / "squashes").touch(0o666)
    (laptop.cluster.shared / "squashes").chmod(0o666)
    with laptop.start(*words) as first, laptop.start(*words) as second:
        said = [first.communicate(timeout=120)[0], second.communicate(timeout=120)[0]]
    assert first.returncode == second.returncode == 0 and all("in True" in text for text in said), said
    squashes = (laptop.cluster.shared / "squashes").read_text()
    assert squashes == "interactive docker://registry.example.com:5000#team/image:1\n"
    gone = laptop.launch("in", "run.env.squash_partition=interactive", image + "/gone:1")
    assert gone.returncode == 4 and "no image docker://registry.example.com#gone:1" in gone.stderr, gone.stderr


@slow
@pytest.mark.parametrize("name", transport.files(support.plan(executor="slurm"), support.job()))
def test_what_was_changed_on_the_cluster_does_not_run(laptop: Person, name: str) -> None:
    laptop.recipe("quick", "print('started')")
    change = "for file in %s/experiments/*/*/*/%s; do echo >>$file; done" % (laptop.base, name)
    done = laptop.launch("quick", "run.env.setup_lines=" + json.dumps(change))
    assert done.returncode == 1 and "did not arrive whole" in done.stderr and "started" not in done.stdout, (
        done.stdout + done.stderr)


@slow
@pytest.mark.parametrize("changes, what, code, said", [
    ({"container_image": "plain"}, "", 0, ""),
    ({"partition": "gone"}, "partition", 4, "invalid partition"),
    ({"account": "gone"}, "partition", 4, "Invalid account"),
    ({"nodes": 3}, "partition", 4, "node configuration is not available"),
    ({"identity": "{home}/.ssh/other"}, "login node", 4, "Permission denied"),
    ({"port": 2223}, "login node", 5, "Connection refused"),
    ({"remote_job_dir": "/proc/here"}, "job folder", 4, "/proc/here"),
])
def test_check_asks_the_cluster(laptop: Person, changes: dict[str, Any], what: str, code: int, said: str) -> None:
    text = (laptop.folder / "profiles/here.toml").read_text()
    for key, value in changes.items():
        line = "%s = %s" % (key, json.dumps(value).replace("{home}", str(laptop.home)))
        text = re.sub("(?m)^%s = .*$" % key, line, text) if re.search("(?m)^%s =" % key, text) else line + "\n" + text
    (laptop.folder / "profiles/changed.toml").write_text(text)
    done = laptop.run("check", "changed", "--json")
    found = {one["what"]: one for one in json.loads(done.stdout)}
    assert done.returncode == code, done.stdout
    if what:
        assert found[what]["state"] == "failure" and said in found[what]["said"], found
    else:
        assert {one["state"] for one in found.values()} <= {"ok", "warning"}
        assert {"login node", "Slurm", "partition", "sacct", "pyxis", "job folder"} <= set(found)


# ---------------------------------------------------------------- secrets

SECRET = "s3cret-4f1c"


def holders(folders: list[Path]) -> list[str]:
    """Files that hold the secret."""
    found = []
    for folder in folders:
        done = subprocess.run(["grep", "-rlF", SECRET, str(folder)], capture_output=True, text=True)
        found += done.stdout.split()
    return found


@slow
@pytest.mark.parametrize("how", ["secrets.HF_TOKEN=env", "env_vars.HF_TOKEN=" + SECRET])
@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "cancelled while it waits"])
def test_secrets_lie_in_one_private_file_until_the_job_is_over(login: Person, end: str, how: str) -> None:
    """Those of [secrets], and a variable that is named like one."""
    login.recipe("secret", """
        import os, signal, sys, time
        print(len(os.environ["HF_TOKEN"]), flush=True)
        while not os.path.exists(sys.argv[-1]):
            time.sleep(0.1)
        sys.exit(5 if sys.argv[-1].endswith("failed") else 0)
        """)
    go = login.cluster.shared / ("go-%s-%s" % (how[:3], end.split()[0]))
    places = [login.base, login.home, login.cluster.root / "log", login.cluster.root / "n1", login.folder]
    blocker = ""
    if end == "cancelled while it waits":
        command = ["sbatch", "--parsable", "-A", "team", "-N2", "--exclusive", "-D", "/tmp", "--wrap", "sleep 600"]
        blocker = login.cluster.on_login(command).stdout.strip()
    env = {"HF_TOKEN": SECRET} if how.endswith("env") else {}
    run = login.started("secret", "run.env." + how, "--", str(go), env=env)
    file = login.folder_of(run) / "secrets.json"
    assert holders(places) == [str(file)] and file.stat().st_mode & 0o777 == 0o600
    if end.startswith("cancelled"):
        if not blocker:
            login.until(run, "running")
            wait_for(lambda: str(len(SECRET)) in login.log_of(run).split())
        login.run("cancel", run)
    else:
        go.touch()
    wait_for(lambda: not file.exists())  # nobody of ours is needed for it: the batch script does it
    assert login.until(run, "done", "failed", "cancelled")["state"] == end.split()[0]
    assert holders(places) == []
    if blocker:
        login.cluster.on_login(["scancel", blocker])
    else:
        assert str(len(SECRET)) in login.log_of(run).split()


@slow
def test_a_preempted_job_is_followed_into_its_next_start_and_keeps_its_secrets(laptop: Person) -> None:
    laptop.recipe("again", """
        import os, pathlib, sys, time
        mark = pathlib.Path(os.environ["NEMO_RUN_DIR"], "been-here")
        print("token", len(os.environ["HF_TOKEN"]), "resumed" if mark.exists() else "fresh", flush=True)
        if not mark.exists():
            mark.touch()
            time.sleep(600)
        """)
    with laptop.start("again", "run.env.partition=low", "run.env.exclusive=true", "run.env.secrets.HF_TOKEN=env",
                      "run.env.retries=1", HF_TOKEN=SECRET) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "fresh" in line:
                break
        run = re.search(r", run (\w+)\n", "".join(lines)).group(1)
        record = (laptop.home / (".local/state/airlift/runs/%s.json" % run)).read_text()
        job_id = re.search(r'"job": "(\d+)"', record).group(1)
        laptop.cluster.on_login(["srun", "-A", "team", "-p", "high", "-N2", "--exclusive", "true"])
        file = laptop.folder_of(run) / "secrets.json"
        assert file.exists()
        # As root: soon, and not in Slurm's two minutes. It revokes the first start's credentials by the second, and a
        # next start within that second or the one after fails by itself.
        time.sleep(2.1)
        root = laptop.cluster.on_laptop(["scontrol", "update", "JobId=" + job_id, "StartTime=now"])
        assert root.returncode == 0, root.stderr
        rest = rest_of(process)
    assert process.returncode == 0, "".join(lines) + rest
    assert "attempt 2 of 2" in rest and "token %d resumed" % len(SECRET) in rest
    assert not file.exists()
    requeue = "scontrol -o show job %s | grep -o Requeue=." % job_id
    assert laptop.cluster.on_login(["sh", "-c", requeue]).stdout == "Requeue=0\n"  # that was the last start


@slow
def test_a_preempted_job_without_retries_ends(laptop: Person) -> None:
    laptop.recipe("nap", NAPPER)
    run = laptop.started("nap", "run.env.partition=low", "run.env.exclusive=true", "--nodes", "2")
    laptop.until(run, "running", seconds=150)
    laptop.cluster.on_login(["srun", "-A", "team", "-p", "high", "-N2", "--exclusive", "true"])
    found = laptop.until(run, "failed", "cancelled")
    assert found["detail"] == "PREEMPTED: a job of higher priority took its nodes", found


@slow
def test_a_long_job_goes_on_in_parts_until_it_ends_by_itself(laptop: Person) -> None:
    """One part saves and ends with 0, one is ended by the signal, the third ends by itself."""
    laptop.recipe("long", """
        import os, pathlib, signal, sys, time
        parts = pathlib.Path(os.environ["NEMO_RUN_DIR"], "parts-of-" + os.environ["AIRLIFT_RUN"])
        with open(parts, "a") as file:
            file.write("x")
        number = len(parts.read_text())
        print("this is part", number, flush=True)
        if number == 3:
            sys.exit(5)
        if number == 1:
            signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
        time.sleep(600)
        """)
    done = laptop.launch("long", "run.env.time=00:01:00", "run.env.grace=45", "run.env.continuations=3", timeout=300)
    run = re.search(r", run (\w+)\n", done.stdout).group(1)
    assert done.returncode == 1 and "exit code 5" in done.stderr, done.stdout + done.stderr
    assert done.stdout.count("saved") == 1 and "rank 0 ended with exit code 0" in done.stdout, done.stdout
    for said in ("this is part 1", "this is part 2", "this is part 3", "part 2 of at most 4", "part 3 of at most 4"):
        assert said in done.stdout, done.stdout
    found = laptop.status(run)
    assert found["detail"] == "FAILED, part 3 of at most 4" and found["job_exit_code"] == 5
    assert (laptop.folder_of(run) / "parts").read_text() == "2\n"


LOGIN = """\
echo "Welcome to the cluster"
export SBATCH_PARTITION=gone SBATCH_TIMELIMIT=1 SLURM_NTASKS=7 MASTER_ADDR=localhost RANK=5 HF_HOME=/opt/hf OWN=mine
"""
CONFIG = """\
Host cluster
  HostName 127.0.0.1
  Port %(port)d
  User %(user)s
  IdentityFile %(key)s
  ProxyJump jump
  LocalForward 2222 127.0.0.1:1
  ExitOnForwardFailure yes
  RemoteCommand tmux attach
  RequestTTY yes
  StdinNull yes
Host jump
  HostName 127.0.0.1
  Port %(port)d
  User %(user)s
  IdentityFile %(key)s
"""
SHOW = "import os; print(sorted((name, os.environ.get(name)) for name in " \
       "('HF_HOME', 'HF_TOKEN', 'MASTER_ADDR', 'OWN', 'NODE_RANK', 'SBATCH_PARTITION', 'SLURM_JOB_PARTITION', 'MINE')))"


@slow
def test_the_users_ssh_configuration_and_a_login_that_talks(laptop: Person) -> None:
    """A jump host, the port in ~/.ssh/config alone, settings in the way, and a .bashrc that prints and exports."""
    keys = {"port": laptop.cluster.port, "user": laptop.cluster.user, "key": laptop.home / ".ssh/id_ed25519"}
    text = (laptop.folder / "profiles/here.toml").read_text()
    for key in ("user", "port", "identity", "account", "partition"):
        text = re.sub("(?m)^%s = .*\n" % key, "", text)
    layout.write(laptop.folder / "profiles/alias.toml", re.sub("(?m)^host = .*", 'host = "cluster"', text))
    layout.write(laptop.home / ".ssh/config", CONFIG % keys)
    bashrc = laptop.cluster.home / ".bashrc"
    before = bashrc.read_text() if bashrc.exists() else ""
    bashrc.write_text(before + LOGIN)
    laptop.recipe("show", SHOW)
    try:
        checked = laptop.run("check", "alias")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        words = ["--repo-root", str(laptop.recipes), "fam", "show", "alias", "--nodes", "2", "--all-ranks"]
        done = laptop.run(*words, env={"HF_TOKEN": "hf_" + "x" * 34, "MINE": "laptop"})
    finally:
        bashrc.write_text(before)
        (laptop.home / ".ssh/config").unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "HF_TOKEN is set here but not sent" in done.stdout
    for rank in "01":
        seen = dict(eval(re.search(r"\[%s\] (\[.*\])" % rank, done.stdout).group(1)))
        assert seen == {"HF_HOME": "/opt/hf", "HF_TOKEN": None, "MASTER_ADDR": "n1", "OWN": "mine", "NODE_RANK": rank,
                        "SBATCH_PARTITION": None, "SLURM_JOB_PARTITION": "batch", "MINE": None}, seen


@slow
def test_the_submitting_shell_stays_out_of_the_job(login: Person) -> None:
    login.recipe("show", SHOW)
    done = login.launch("show", env={"HF_TOKEN": "hf_" + "x" * 34, "MASTER_ADDR": "localhost", "SBATCH_PARTITION": "low",
                                     "SBATCH_TIMELIMIT": "1", "OWN": "shell", "MINE": "shell", "RANK": "3"})
    assert done.returncode == 0 and "HF_TOKEN is set here but not sent" in done.stdout, done.stdout + done.stderr
    seen = dict(eval(re.search(r"(\[\('HF_.*\])", done.stdout).group(1)))
    assert [seen[name] for name in ("HF_TOKEN", "MINE", "OWN", "SBATCH_PARTITION")] == [None] * 4
    assert seen["SLURM_JOB_PARTITION"] == "batch"


@slow
def test_a_shared_connection_of_the_users_is_the_way_in(laptop: Person) -> None:
    """As where a second factor is asked for: without the open connection, nothing gets in."""
    key = laptop.home / ".ssh/factor"
    (laptop.home / ".ssh/id_ed25519").rename(key)
    layout.write(laptop.home / ".ssh/config", "Host 127.0.0.1\n  ControlPath %s/.ssh/cm-%%C\n" % laptop.home)
    laptop.recipe("quick", "print('started')")
    profile = laptop.folder / "profiles/open.toml"
    profile.write_text(re.sub("(?m)^identity = .*\n", "", (laptop.folder / "profiles/here.toml").read_text()))
    words = ["--repo-root", str(laptop.recipes), "fam", "quick", "open"]
    try:
        assert laptop.run(*words).returncode == 4
        enter = laptop.cluster.laptop_command(["ssh", "-M", "-N", "-p", str(laptop.cluster.port), "-i", str(key), "-l",
                                               laptop.cluster.user, "127.0.0.1"])
        with subprocess.Popen(enter, env=laptop.cluster.environment(str(laptop.home)), stdin=subprocess.DEVNULL) as master:
            wait_for(lambda: list((laptop.home / ".ssh").glob("cm-*")))
            done = laptop.run(*words)
            assert done.returncode == 0 and "started" in done.stdout, done.stdout + done.stderr
            assert master.poll() is None
            master.terminate()
    finally:
        key.rename(laptop.home / ".ssh/id_ed25519")
        (laptop.home / ".ssh/config").unlink()


@slow
def test_any_option_of_sbatch_and_srun(laptop: Person) -> None:
    laptop.recipe("quick", "print('started')")
    text = (laptop.folder / "profiles/here.toml").read_text()
    more = '[sbatch]\ncomment = "for \'us\' $HOME"\nnodelist = "n2"\nmail-type = ["END", "FAIL"]\nhold = false\nspread-job = true\n'
    layout.write(laptop.folder / "profiles/options.toml", text + more + '[srun]\nlabel = true\n')
    done = laptop.run("--repo-root", str(laptop.recipes), "fam", "quick", "options")
    assert done.returncode == 0 and re.search("^0: started", done.stdout, re.MULTILINE), done.stdout + done.stderr
    record = json.loads((laptop.home / (".local/state/airlift/runs/%s.json" % re.search(r", run (\w+)\n", done.stdout).group(1))).read_text())
    shown = laptop.cluster.on_login(["scontrol", "-o", "show", "job", record["record"]["job"]]).stdout
    for words in ("Comment=for 'us' $HOME ", "NodeList=n2 ", "ReqNodeList=n2 ", "MailType=END,FAIL"):
        assert words in shown, shown


# ---------------------------------------------------------------- stages that wait for each other


def chain(person: Person, *words: str) -> list[str]:
    """Three stages, launched at once; the first ends when it may, with the code that it finds. Gives the runs."""
    person.recipe("first", """
        import os, sys, time
        print("token", len(os.environ["HF_TOKEN"]), flush=True)
        while not os.path.exists(sys.argv[-1]):
            time.sleep(0.1)
        sys.exit(int(open(sys.argv[-1]).read()))
        """)
    person.recipe("second", "print('the second', flush=True)")
    person.recipe("third", "print('the third', flush=True)")
    done = person.launch("first,second,third", "--detach", "run.env.secrets.HF_TOKEN=env", *words, env={"HF_TOKEN": SECRET})
    assert done.returncode == 0, done.stdout + done.stderr
    runs = re.findall(r"logs -f (\w+)", done.stdout)
    assert len(runs) == 3 and done.stdout.count("starts when run") == 2
    return runs


def may_end(person: Person, code: int) -> Path:
    path = person.cluster.shared / "first-may-end"
    layout.write(person.cluster.root / "code", str(code)).rename(path)
    return path


@slow
@pytest.mark.parametrize("tunnel", ["ssh", "local"])
def test_stages_launched_at_once_run_in_order(people: dict[str, Person], tunnel: str) -> None:
    person = people[tunnel]
    runs = chain(person, "run.env.retries=1", "--", str(person.cluster.shared / "first-may-end"))
    rows = [person.status(run) for run in runs]
    assert [row["after"] for row in rows] == [None, *runs[:2]]
    assert [row["detail"] for row in rows[1:]] == ["PENDING: Dependency"] * 2
    assert "is waiting (PENDING: Dependency)" in person.run("logs", runs[1]).stderr
    person.until(runs[0], "running")
    number = json.loads(next(person.home.glob(".local/state/airlift/runs/%s.json" % runs[0])).read_text())["record"]["job"]
    reader = None
    if tunnel == "ssh":
        command = person.cluster.laptop_command(person.words("logs", "-f", runs[2]))
        reader = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  env=person.cluster.environment(str(person.home)))
    else:  # a first stage that is requeued is not one that has failed
        time.sleep(2.1)
        person.cluster.on_laptop(["scontrol", "requeue", number])
        person.until(runs[0], "waiting")
        time.sleep(2.1)
        person.cluster.on_laptop(["scontrol", "update", "JobId=" + number, "StartTime=now"])
        person.until(runs[0], "running")
        assert person.status(runs[2])["detail"] == "PENDING: Dependency"
    may_end(person, 0)
    if reader:
        said = rest_of(reader)
        assert reader.returncode == 0 and "waiting (PENDING: Dependency)" in said and "the third" in said, said
    for run in runs:
        assert person.until(run, "done", "failed", "cancelled")["state"] == "done"
    assert "the second" in person.log_of(runs[1])
    (person.cluster.shared / "first-may-end").unlink()


@slow
def test_a_stage_that_fails_ends_those_behind_it(laptop: Person) -> None:
    runs = chain(laptop, "--", str(laptop.cluster.shared / "first-may-end"))
    may_end(laptop, 3)
    done = laptop.run("logs", "-f", runs[2])
    assert done.returncode == 1 and "cancelled (CANCELLED: the stage before it did not succeed)" in done.stdout
    assert "status shows how the stages before it ended" in done.stderr
    assert [laptop.status(run)["state"] for run in runs] == ["failed", "cancelled", "cancelled"]
    assert laptop.status(runs[0])["job_exit_code"] == 3
    assert laptop.cluster.on_login(["squeue", "-h", "-n", ",".join("airlift.fam-%s-%s" % pair for pair in zip(
        ("first", "second", "third"), runs, strict=True))]).stdout == ""
    assert holders([laptop.base]) == []
    (laptop.cluster.shared / "first-may-end").unlink()


@slow
def test_what_is_left_of_a_chain_is_cancelled(login: Person) -> None:
    runs = chain(login, "--", str(login.cluster.shared / "nobody"))
    done = login.run("cancel", runs[1])
    assert done.returncode == 0 and re.findall(r"^(\w+), .*: job \d+ was cancelled$", done.stdout, re.MULTILINE) == [
        runs[2], runs[1]], done.stdout + done.stderr
    assert login.status(runs[0])["state"] in ("waiting", "running")
    assert runs[0] in login.run("cancel", runs[0]).stdout
    assert [login.status(run)["state"] for run in runs] == ["cancelled"] * 3
    assert holders([login.base]) == []


@slow
@pytest.mark.parametrize("stage, code, said", [
    ("partition = \"gone\"", 4, "invalid partition"), ("port = 2223", 5, "Connection refused")])
def test_a_later_stage_that_is_refused_takes_the_chain_back(laptop: Person, stage: str, code: int, said: str) -> None:
    text = (laptop.folder / "profiles/here.toml").read_text()
    (laptop.folder / "profiles/odd.toml").write_text(text + "[stages.second]\n" + stage + "\n")
    for name in ("first", "second"):
        laptop.recipe(name, NAPPER)
    done = laptop.run("--repo-root", str(laptop.recipes), "fam", "first,second", "odd", "--detach")
    assert done.returncode == code and said in done.stderr, done.stdout + done.stderr
    assert re.search("^not all stages could be submitted", done.stderr), done.stderr
    run = re.search(r"logs -f (\w+)", done.stdout).group(1)
    assert re.search("^%s, fam/first on odd: job [0-9]+ was cancelled$" % run, done.stderr, re.MULTILINE), done.stderr
    assert laptop.status(run)["state"] == "cancelled"


# ---------------------------------------------------------------- repositories


@pytest.fixture
def repository(cluster: Cluster, tmp_path: Path) -> Path:
    """A repository with the commits "one" (tag v1) and "two" (branch main)."""
    place = cluster.root / ("repo-" + tmp_path.name)
    place.mkdir()
    (cluster.home / ".gitconfig").write_text("[safe]\n    directory = *\n")  # it is not the cluster user's own
    for command in (["init", "-q", "-b", "main"], ["config", "user.name", "x"], ["config", "user.email", "x@x"]):
        git(place, *command)
    commit(place, "one")
    git(place, "tag", "-a", "-m", "first", "v1")
    commit(place, "two")
    return place


def git(place: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(place), *words], check=True, capture_output=True, text=True).stdout.strip()


def commit(place: Path, text: str) -> str:
    (place / "content").write_text(text)
    git(place, "add", "content")
    git(place, "commit", "-q", "-m", text)
    return git(place, "rev-parse", "HEAD")


def mounting(person: Person, place: Path, ref: str, image: str = CONTAINER) -> str:
    """A config that mounts the repository; gives its path."""
    mount = "${auto_mount:git+file://%s@%s,/opt/thing}" % (place, ref)
    text = 'run:\n  env:\n    container_image: "%s"\n    mounts: ["%s"]\n' % (image, mount)
    return str(layout.write(person.cluster.root / ("config-%s.yaml" % re.sub(r"\W", "-", ref)), text))


@slow
def test_auto_mounts_are_cloned_on_the_cluster_and_seen_in_the_container(laptop: Person, repository: Path) -> None:
    laptop.recipe("thing", 'print("content:", open("/opt/thing/content").read())')
    first = git(repository, "rev-parse", "v1^{commit}")
    second = git(repository, "rev-parse", "main")
    runs = {ref: laptop.started("thing", "-c", mounting(laptop, repository, ref)) for ref in ("v1", "main", first)}
    third = commit(repository, "three")  # which no clone has yet
    runs["again"] = laptop.started("thing", "-c", mounting(laptop, repository, "main"))
    expected = [("one", first), ("two", second), ("one", first), ("three", third)]
    for (ref, run), (content, sha) in zip(runs.items(), expected, strict=True):
        assert laptop.until(run, "done", "failed")["state"] == "done", laptop.log_of(run)
        assert "content: " + content in laptop.log_of(run), ref
        script = next(laptop.folder_of(run).parent.glob("*_sbatch.sh")).read_text()
        assert re.search(r"--container-mounts \S*%s/auto_mounts/\S+/%s:/opt/thing" % (laptop.base, sha), script), script


@slow
def test_a_repository_that_cannot_be_fetched_is_said(laptop: Person, repository: Path) -> None:
    laptop.recipe("thing", "pass")
    for place, ref, said in ((repository, "gone", "neither a tag nor a branch gone"),
                             (repository.with_name("nowhere"), "main", "nowhere"), (repository, "0" * 40, "0000")):
        done = laptop.launch("thing", "-c", mounting(laptop, place, ref))
        assert done.returncode == 4 and said in done.stderr and len(done.stderr.strip().splitlines()) == 2, done.stderr


@slow
def test_folders_that_the_profile_names_are_seen_in_the_container(laptop: Person) -> None:
    laptop.recipe("folders", """
        import os
        cache = os.environ["VLLM_CACHE_ROOT"]
        open(os.path.join(cache, "made"), "w").close()
        print(cache, os.listdir("/opt/lustre"), os.listdir(os.environ["SIFS"]))
        """)
    shared = laptop.cluster.shared
    (shared / "sifs").mkdir()
    (shared / "sifs/tool.sif").touch()
    done = laptop.launch("folders", "run.env.container_image=" + CONTAINER, "run.env.persistent_cache=%s/cache" % shared,
                         "run.env.sif_dir=%s/sifs" % shared, "run.env.lustre_mount=%s/sifs:/opt/lustre" % shared,
                         "run.env.env_vars.SIFS=%s/sifs" % shared)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "%s/cache/vllm_compile_cache ['tool.sif'] ['tool.sif']" % shared in done.stdout
    assert (shared / "cache/vllm_compile_cache/made").exists()


@slow
def test_a_time_limit_is_said(cluster: Cluster, login: Person) -> None:
    found = login.until(cluster.late, "failed", seconds=150)
    assert found["detail"] == "TIMEOUT: it reached its time limit of 00:01:00" and found["job_exit_code"] is None


@slow
def test_ctrl_c_leaves_the_job_alone(laptop: Person) -> None:
    laptop.recipe("nap", NAPPER)
    with laptop.start("nap") as process:
        assert process.stdout
        said = ""
        while "napping" not in said:
            said += process.stdout.readline()
        found = subprocess.run(["pgrep", "-f", "^%s %s/launch.py" % (sys.executable, laptop.folder)], text=True,
                               capture_output=True)
        os.kill(int(found.stdout), signal.SIGINT)
        rest = rest_of(process)
    run = re.search(r", run (\w+)\n", said).group(1)
    assert "the job goes on" in rest and process.returncode == 0
    assert laptop.status(run)["state"] == "running"
    laptop.run("cancel", run)


@slow
def test_the_cluster_can_be_started_by_hand() -> None:
    support.need(not why_not(), why_not() or "")
    process = subprocess.Popen([sys.executable, "-m", "tests.slurm"], cwd=layout.REPO, stdout=subprocess.PIPE,
                               text=True, env={"PATH": SYSTEM_PATH})
    assert process.stdout and "by SSH" in process.stdout.readline()
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()


RAY = """
import os, ray, time
ray.init(log_to_driver=False)
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]

@ray.remote(num_cpus=0)
def there():
    import helper
    return os.environ["TOKEN"], os.environ["NODE_RANK"], helper.__file__.startswith(os.environ["AIRLIFT_CODE"])

pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
found = ray.get([there.options(scheduling_strategy=pinned(node, soft=False)).remote() for node in nodes])
print(len(nodes), 'nodes "quoted"', sorted(found), flush=True)
time.sleep(float(os.environ["NAP"]))
"""


@slow
@pytest.mark.parametrize("image", [NO_CONTAINER, CONTAINER])
def test_ray_on_two_nodes(laptop: Person, image: str) -> None:
    """The source on every node, a secret that stands in no file in the end, the driver's exit code."""
    layout.recipe(laptop.recipes, "fam/ray", RAY + "raise SystemExit(4)\n", launch="ray", nodes=2)
    layout.write(laptop.recipes / "src/helper.py", "")
    profile = laptop.folder / "profiles/here.toml"
    before = profile.read_text()
    profile.write_text(before + '[secrets]\nTOKEN = "env"\n')
    try:
        done = laptop.launch("ray", "--nodes", "2", "--all-ranks", "run.env.container_image=" + (image or '""'),
                             "run.env.env_vars.NAP=0", env={"TOKEN": "very-secret"})
    finally:
        profile.write_text(before)
    assert done.returncode == 1 and "exit code 4" in done.stderr, done.stdout + done.stderr
    assert "[0] 2 nodes \"quoted\" [('very-secret', '0', True), ('very-secret', '1', True)]" in done.stdout
    codes = re.findall(r"^\[\d\] airlift: rank \d ended with exit code (\d+)", done.stdout, re.MULTILINE)
    assert "4" in codes and set(codes) <= {"4", "143"}, codes  # after the first, srun ends the other
    run = re.search(r", run (\w+)\n", done.stdout).group(1)
    texts = [path.read_text(errors="replace") for path in laptop.folder_of(run).parent.parent.rglob("*") if path.is_file()]
    assert not [text for text in texts if "very-secret" in text.replace("[('very-secret'", "").replace("('very-secret'", "")]


@slow
def test_a_ray_job_is_cancelled(login: Person) -> None:
    layout.recipe(login.recipes, "fam/ray", RAY, launch="ray", nodes=2)
    layout.write(login.recipes / "src/helper.py", "")
    run = login.started("ray", "--nodes", "2", "run.env.env_vars.NAP=300", "run.env.env_vars.TOKEN=x")
    wait_for(lambda: "2 nodes" in login.log_of(run), 90)
    assert "was cancelled" in login.run("cancel", run).stdout
    assert login.cluster.on_login(["pgrep", "-f", "airlift-%s-ray" % run]).stdout == ""
