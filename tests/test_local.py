"""The local backend with real pods: what reaches them, how they end, and that nothing is ever left running."""

import json
import os
import pty
import random
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from layout import flat_folder, launcher, recipe, write

WORDS = ("nano3", "sft", "local")

PROBE = """
import json, os, sys
rank, root = os.environ["NODE_RANK"], os.environ["NEMO_RUN_DIR"]
told = {"env": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd(), "exe": sys.executable, "pid": os.getpid(),
        "bash": os.getppid(), "config": open(os.environ["AIRLIFT_CONFIG"], encoding="utf-8").read(),
        "stdin": sys.stdin.read()}
with open(os.path.join(root, "probe-%s.new" % rank), "w") as file:
    json.dump(told, file)
os.rename(file.name, os.path.join(root, "probe-%s.json" % rank))
print("hello from rank", rank)
"""
SLEEP = PROBE + "sys.stdout.flush()\nimport time\ntime.sleep(300)\n"
STUBBORN = PROBE + """sys.stdout.flush()
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen(["sleep", "300"], start_new_session=True)
open(os.path.join(root, "stubborn-" + rank), "w").close()
time.sleep(300)
"""


class Place:
    """A copied launcher with a source tree of its own, and an account without anything in it."""

    def __init__(self, tmp):
        self.tmp = tmp
        self.folder = flat_folder(tmp / "air lift é")
        self.output = self.folder / "output/nano3"
        self.state = tmp / "state"
        for name in ("home", "scratch"):
            (tmp / name).mkdir()
        self.env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp / "home"), "AIRLIFT_HOME": str(self.state),
                    "TMPDIR": str(tmp / "scratch"), "CANARY": "sings"}
        self.started = []

    def recipe(self, body, **fields):
        recipe(self.folder, body=body, **{"launch": "direct", "nodes": 2, **fields})

    def run(self, *words, env=None, **options):
        return launcher(self.folder, *(words or WORDS), env=self.env | (env or {}), cwd=self.tmp, **options)

    def start(self, *words, **options):
        """The launcher as a process group of its own, as a shell starts it."""
        process = subprocess.Popen([sys.executable, str(self.folder / "launch.py"), *(words or WORDS)], env=self.env,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   cwd=self.tmp, start_new_session=True, **options)
        self.started.append(process)
        return process

    def probes(self, ranks=2, seconds=30):
        """What the pods told, once all have."""
        until(lambda: all((self.output / ("probe-%d.json" % rank)).exists() for rank in range(ranks)), seconds)
        return [json.loads((self.output / ("probe-%d.json" % rank)).read_text()) for rank in range(ranks)]

    def run_file(self, run):
        path = self.state / "runs" / (run + ".json")
        assert path.stat().st_mode & 0o777 == 0o600
        return json.loads(path.read_text())

    def left(self):
        """Processes of this test that still run: each has a path of it in its environment."""
        mark, found = str(self.tmp).encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = mark in (entry / "environ").read_bytes()
                if ours and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(entry.name))
            except OSError:
                pass
        return found

    def nothing_left(self, seconds=15):
        until(lambda: not self.left(), seconds)
        assert list((self.tmp / "scratch").glob("*/*")) == []


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    for pid in made.left():  # only after a failure
        os.kill(pid, signal.SIGKILL)
    for process in made.started:
        process.communicate()


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this took longer than %d s" % seconds
        time.sleep(0.02)


def run_id(out):
    return re.search(r", run ([a-z0-9]{6})$", out, re.MULTILINE).group(1)


def lines_of(out, rank):
    return [line[4:] for line in out.splitlines() if line.startswith("[%d] " % rank)]


# ---------------------------------------------------------------- what reaches the pods


def test_two_pods_of_one_tree(place):
    place.recipe(PROBE, yaml="""\
        run: {env: {env_vars: {FROM_YAML: "a b"}}}
        out: /nemo_run/model
        code: ${oc.env:PWD}/src
        text: "first\\n/nemo_run/second\\ttab: #1 'quoted'"
        number: "1e3"
        """)
    done = place.run(*WORDS, "lr=1", "--", "--flag", "two words", "$HOME")
    assert (done.returncode, done.stderr) == (0, "")
    run = run_id(done.stdout)
    first, *_, times, last = done.stdout.splitlines()
    summary = re.fullmatch(r"nano3/sft on local: 2 nodes, CPU only, (\d+) files of (.*), [\d.]+ K?i?B, "
                           r"sha256 ([0-9a-f]{12}), run \w+", first)
    assert summary and summary.group(2) == str(place.folder), first
    assert re.fullmatch(r"packing \d\.\d s, submitting \d\.\d s, waiting 0\.0 s, running \d\.\d s", times), times
    assert re.fullmatch(r"done in \d+ s; outputs in " + re.escape(str(place.output)), last)
    digests = set()
    for rank in (0, 1):
        lines = lines_of(done.stdout, rank)
        said = re.search(r"rank (\d) of 2, sha256 ([0-9a-f]{64}), (\d+) files", lines[0])
        assert said.group(1) == str(rank) and said.group(3) == summary.group(1)
        digests.add(said.group(2))
        assert "hello from rank %d" % rank in lines
    assert len(digests) == 1 and digests.pop().startswith(summary.group(3))

    told = place.probes()
    envs = [probe["env"] for probe in told]
    assert [env["NODE_RANK"] for env in envs] == ["0", "1"]
    assert envs[0]["MASTER_ADDR"] == envs[1]["MASTER_ADDR"] == "127.0.0.1"
    assert envs[0]["MASTER_PORT"] == envs[1]["MASTER_PORT"]
    assert envs[0]["TMPDIR"] != envs[1]["TMPDIR"]
    for env, probe in zip(envs, told, strict=True):
        assert env["PATH"].split(":") == [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
        assert Path(probe["exe"]).parent == Path(sys.executable).parent
        assert env["NEMO_RUN_DIR"] == str(place.output) and env["AIRLIFT_RUN"] == run and env["NNODES"] == "2"
        assert env["FROM_YAML"] == "a b" and env["OMP_NUM_THREADS"] == "1" and env["CUDA_VISIBLE_DEVICES"] == ""
        assert env["PYTHONPATH"].split(":")[0] == env["AIRLIFT_CODE"] + "/src"
        assert probe["argv"] == [env["AIRLIFT_CODE"] + "/src/nemotron/recipes/nano3/sft/train.py", "--config",
                                 env["AIRLIFT_CONFIG"], "--flag", "two words", "$HOME"]
        assert probe["cwd"] == str(place.output / "work") and probe["stdin"] == ""
        assert yaml.safe_load(probe["config"]) == {
            "out": str(place.output / "model"), "code": env["AIRLIFT_CODE"] + "/src", "number": "1e3", "lr": 1,
            "text": "first\n%s/second\ttab: #1 'quoted'" % place.output}
        # nothing of the launcher's: its own words, the pod's, the recipe's, and what bash adds
        assert set(env) <= {
            "PATH", "HOME", "LANG", "TMPDIR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES",
            "NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT", "PYTHONUNBUFFERED", "PYTHONPATH", "NEMO_RUN_DIR",
            "AIRLIFT_RUN", "AIRLIFT_CODE", "AIRLIFT_CONFIG", "OMP_NUM_THREADS", "FROM_YAML", "PROGRESS_FILE",
            "WANDB_DIR", "RAY_TMPDIR", "USER", "LOGNAME", "PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
    record = place.run_file(run)
    assert (record["recipe"], record["profile"], record["nodes"]) == ("nano3/sft", "local", 2)
    assert record["job_exit_code"] == 0
    for rank in (0, 1):
        assert "hello from rank %d\n" % rank in (place.output / "runs" / run / ("rank-%d.log" % rank)).read_text()
        assert (place.output / "runs" / run / ("rank-%d.exit" % rank)).read_text() == "0\n"
    assert os.listdir(place.tmp / "home") == []
    again = place.run("logs", run, "--all-ranks")
    assert again.returncode == 0 and lines_of(again.stdout, 1) == lines_of(done.stdout, 1)
    place.nothing_left()


def test_one_pod_has_no_prefix_and_an_edit_that_is_not_committed_counts(place):
    place.recipe("print('one', flush=True)\nimport sys\nsys.stdout.buffer.write(b'\\xff no line end')\n", nodes=1)
    one = place.run(text=False)
    assert one.returncode == 0 and b"\none\n\xff no line end" in one.stdout
    place.recipe("print('two')\n", nodes=1)
    two = place.run(text=False)
    assert two.returncode == 0 and b"\ntwo\n" in two.stdout
    digests = [re.search(rb"sha256 ([0-9a-f]{64})", done.stdout).group(1) for done in (one, two)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(("gpus", "seen"), [(2, ["0,1", "2,3"]), (0, ["", ""]), ("gpu", [None, None])])
def test_each_pod_has_its_own_gpus(place, gpus, seen):
    place.recipe(PROBE)
    assert place.run(*WORDS, "run.env.gpus_per_node=%s" % gpus).returncode == 0
    assert [probe["env"].get("CUDA_VISIBLE_DEVICES") for probe in place.probes()] == seen


def test_setup_run_command_and_workdir_of_the_profile(place):
    (place.tmp / "work dir").mkdir()
    write(place.folder / "setup.sh", "export FROM_SETUP='a b'\n")
    write(place.folder / "profiles/mine.toml", """\
        extends = "local"
        nodes = 1
        workdir = "%s/work dir"
        startup_commands = [". '%s/setup.sh'", "export COUNT=$((1 + 1))"]
        run_command = "python -X dev {script} --with {config} '{{braces}}'"
        """ % (place.tmp, place.folder))
    place.recipe(PROBE)
    done = place.run("nano3", "sft", "mine", "--nodes", "1")
    assert (done.returncode, done.stderr) == (0, "")
    told = place.probes(1)[0]
    assert told["cwd"] == str(place.tmp / "work dir")
    assert (told["env"]["FROM_SETUP"], told["env"]["COUNT"]) == ("a b", "2")
    assert told["argv"][1:] == ["--with", told["env"]["AIRLIFT_CONFIG"], "{braces}"]


def test_a_secret_reaches_the_pod_and_no_file(place):
    secret = "s3cret-" + os.urandom(8).hex()
    write(place.folder / "profiles/mine.toml", 'extends = "local"\n[secrets]\nMY_TOKEN = "env"\n')
    place.recipe("""
        import os, time
        print("it has %d characters" % len(os.environ["MY_TOKEN"]))
        time.sleep(300)
        """.replace("\n        ", "\n"))
    process = subprocess.Popen([sys.executable, str(place.folder / "launch.py"), "nano3", "sft", "mine", "--detach"],
                               env=place.env | {"MY_TOKEN": secret}, stdout=subprocess.PIPE, text=True, cwd=place.tmp)
    out = process.communicate(timeout=30)[0]
    run = run_id(out)
    assert "note: MY_TOKEN is sent by value, in the job's environment" in out
    until(lambda: place.run("logs", run, "--all-ranks").stdout.count("it has %d characters" % len(secret)) == 2, 20)
    shown = place.run("status", run, "--json").stdout + place.run("nano3", "sft", "mine", "--json",
                                                                  env={"MY_TOKEN": secret}).stdout
    assert secret not in shown + out
    for path in place.tmp.rglob("*"):  # while the pods run
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    for pid in place.left():
        assert secret.encode() not in Path("/proc/%d/cmdline" % pid).read_bytes()
    assert place.run("cancel", run).returncode == 0
    place.nothing_left()


def test_two_launches_at_once(place):
    place.recipe("import os, time\nprint('port', os.environ['MASTER_PORT'], flush=True)\ntime.sleep(1)\n")
    both = [place.start(), place.start()]
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert run_id(outs[0]) != run_id(outs[1])
    ports = [re.findall(r"^\[\d\] port (\d+)$", out, re.MULTILINE) for out in outs]
    assert [len(found) for found in ports] == [2, 2]
    assert ports[0][0] == ports[0][1] != ports[1][0] == ports[1][1]
    assert len(place.run("status").stdout.splitlines()) == 1 + 2
    place.nothing_left()


# ---------------------------------------------------------------- how it ends


def test_the_first_failure_ends_the_others_and_its_code_is_told(place):
    place.recipe(PROBE + """
import time
while not os.path.exists(os.path.join(root, "probe-%d.json" % (1 - int(rank)))):
    time.sleep(0.01)
if rank == "1":
    sys.exit(7)
sys.stdout.flush()
time.sleep(300)
""")
    done = place.run()
    run = run_id(done.stdout)
    assert done.returncode == 1
    assert re.fullmatch(r"airlift: the job failed with exit code 7 after \d+ s\n"
                        r"see python launch\.py logs %s\n" % run, done.stderr)
    assert place.run_file(run)["job_exit_code"] == 7
    place.nothing_left()
    row = json.loads(place.run("status", run, "--json").stdout)[0]
    assert (row["state"], row["job_exit_code"], row["run"]) == ("failed", 7, run)


BARRIER = """
import datetime, os, time
import torch.distributed as dist
rank = int(os.environ["NODE_RANK"])
if rank:  # the store's server, so that rank 0 loses its connection when this one ends
    dist.init_process_group("gloo", rank=1 - rank, world_size=2, init_method="tcp://127.0.0.1:%s" % os.environ["MASTER_PORT"])
    time.sleep(0.5)
    raise ValueError("row 7 has no text")
dist.init_process_group("gloo", rank=1, world_size=2, init_method="tcp://127.0.0.1:%s" % os.environ["MASTER_PORT"])
dist.barrier()
"""


def test_with_real_torch_the_last_lines_name_rank_and_reason(place):
    """Rank 0 waits in Gloo, and its own traceback looks like the cause."""
    pytest.importorskip("torch")
    place.recipe(BARRIER)
    done = place.run()
    assert done.returncode == 1
    last = done.stdout.splitlines()[-4:]
    assert last[0] == "-- rank 1 failed with exit code 1" and last[-1] == "-- ValueError: row 7 has no text", done.stdout
    assert re.match("airlift: the job failed with exit code 1 ", done.stderr), done.stderr


@pytest.mark.parametrize(("profile", "code", "what"), [
    ('startup_commands = ["true", "no-such-command"]', 86, "a startup command failed; fix startup_commands"),
    ('run_command = "no-such-tool {script}"', 87, "the image lacks what the recipe is started with"),
    ('workdir = "/no/such/folder"', 87, "the image lacks what the recipe is started with"),
    ('workspace = "/proc/nowhere"', 83, "the pod could not put the files in place"),
])
def test_a_failure_of_the_pod_itself_is_explained(place, profile, code, what):
    write(place.folder / "profiles/mine.toml", 'extends = "local"\n' + profile)
    place.recipe(PROBE)
    done = place.run("nano3", "sft", "mine")
    first, second = done.stderr.splitlines()
    assert done.returncode == 1
    assert first.startswith("airlift: the job failed with exit code %d after " % code) and second.startswith("the pod's log says: " + what)
    place.nothing_left()


@pytest.mark.parametrize("body", [SLEEP, STUBBORN], ids=["sleeping", "ignoring-signals"])
def test_ctrl_c_leaves_nothing_running(place, body):
    local = place.folder / "backends/local.py"
    source = local.read_text()
    assert "\nGRACE_S = 10.0 " in source
    local.write_text(source.replace("\nGRACE_S = 10.0 ", "\nGRACE_S = 0.5 "))
    place.recipe(body)
    process = place.start()
    place.probes()
    if body is STUBBORN:
        until(lambda: all((place.output / ("stubborn-%d" % rank)).exists() for rank in (0, 1)), 10)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (1, "\nending the pods: ended, with all its pods\n")
    assert place.left() == []
    place.nothing_left()
    assert json.loads(place.run("status", run_id(out), "--json").stdout)[0]["state"] == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_when_the_launcher_dies_so_do_its_pods(place, number):
    place.recipe(SLEEP)
    process = place.start()
    place.probes()
    process.send_signal(number)
    assert process.wait(10) == -number
    place.nothing_left()


def test_when_nobody_reads_the_pods_end(place):
    place.recipe(PROBE + "import time\nwhile True:\n    print('still here', flush=True)\n    time.sleep(0.05)\n")
    process = place.start()
    while "still here" not in process.stdout.readline():
        pass
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(20), err) == (1, "\nending the pods: ended, with all its pods\n")
    process.stderr.close()
    place.started.remove(process)
    place.nothing_left()


def test_a_pod_that_is_killed_takes_the_job_with_it(place):
    """As by the kernel for its memory: pod.py dies without a word, and what it ran is left without a parent."""
    place.recipe(SLEEP)
    process = place.start()
    told = place.probes()
    pod = int(Path("/proc/%d/stat" % told[0]["bash"]).read_text().rpartition(")")[2].split()[1])
    os.kill(pod, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "the job failed with exit code 137 after" in err
    assert place.run_file(run_id(out))["job_exit_code"] == 137
    place.nothing_left()


def test_detach_status_logs_cancel(place):
    place.recipe(SLEEP)
    done = place.run(*WORDS, "--detach")
    run = run_id(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("started; to follow it: python launch.py logs -f %s\n" % run)
    place.probes()
    heads, row = place.run("status").stdout.splitlines()
    assert heads.split() == ["RUN", "STATE", "AGE", "RECIPE", "PROFILE", "NODES", "DETAIL"]
    assert re.fullmatch(r"%s  running  \d+ s +nano3/sft  local    2" % run, row)
    row = json.loads(place.run("status", run, "--json").stdout)[0]
    assert (row["state"], row["job_exit_code"], row["nodes"], row["profile"]) == ("running", None, 2, "local")
    until(lambda: "hello from rank 1" in lines_of(place.run("logs", run, "--all-ranks").stdout, 1), 10)
    cancelled = place.run("cancel", run)
    assert (cancelled.returncode, cancelled.stdout) == (
        0, "%s, nano3/sft on local: ended, with all its pods\n" % run)
    assert place.left() == []
    assert json.loads(place.run("status", run, "--json").stdout)[0]["state"] == "cancelled"
    assert place.run("cancel", run).stdout.endswith(": it had already ended (cancelled); nothing was done\n")
    assert place.run_file(run)["record"]["pid"] > 0
    place.nothing_left()


def test_progress_moves_on_the_launchers_terminal_and_is_in_no_log(place):
    place.recipe("""
        import os, time
        told = os.environ["PROGRESS_FILE"]
        def tell(line):
            open(told + ".new", "w").write(line)
            os.replace(told + ".new", told)
        print("first word")
        tell("half, \\x1b]0;of it " + "x" * 500)
        go = os.path.join(os.environ["NEMO_RUN_DIR"], "go")
        while not os.path.exists(go):
            time.sleep(0.02)
        print("last word")
    """, nodes=1)
    terminal = Terminal(place)
    terminal.until(b"first word\r\n")
    moved = terminal.until(re.compile(rb"\r(half, [^\r]*)\x1b\[K")).group(1)
    assert moved == b"half, ]0;of it " + b"x" * 64  # no control of the recipe's, and cut to 80 columns
    write(place.output / "go", "")
    terminal.until(b"\r\x1b[Klast word\r\n")
    assert terminal.end() == 0
    logged = place.run("logs", run_id(terminal.shown.decode().replace("\r\n", "\n")))
    assert "first word\nlast word\n" in logged.stdout and "half" not in logged.stdout
    again = place.run()
    assert again.returncode == 0 and "last word" in again.stdout and "half" not in again.stdout
    place.nothing_left()


class Terminal:
    """The launcher on a terminal of 80 columns, and what it has shown there."""

    def __init__(self, place):
        self.main, terminal = pty.openpty()
        self.process = subprocess.Popen([sys.executable, str(place.folder / "launch.py"), *WORDS], cwd=place.tmp,
                                        env=place.env | {"COLUMNS": "80", "NO_COLOR": "1"}, stdin=subprocess.DEVNULL,
                                        stdout=terminal, stderr=terminal, start_new_session=True)
        os.close(terminal)
        self.shown = b""

    def until(self, words, seconds=60):
        """Read on to these words (bytes), or the first match of a pattern; returns the match."""
        pattern = re.compile(re.escape(words)) if isinstance(words, bytes) else words
        deadline = time.monotonic() + seconds
        while not pattern.search(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.main], [], [], 0.1)[0]:
                self.shown += os.read(self.main, 4096)
        return pattern.search(self.shown)

    def end(self):
        """Read to the end; returns the exit code."""
        try:
            while data := os.read(self.main, 4096):
                self.shown += data
        except OSError:  # the other side is closed
            pass
        os.close(self.main)
        return self.process.wait()


def test_logs_print_what_there_is_and_follow_to_the_end(place):
    """Of one rank, of another, of all; a job that still runs is followed only when that is asked for."""
    place.recipe("import os, time\nprint('hello from', os.environ['NODE_RANK'], flush=True)\n"
                 "while not os.path.exists(os.path.join(os.environ['NEMO_RUN_DIR'], 'go')): time.sleep(0.02)\n"
                 "raise SystemExit(3)")
    run = run_id(place.run(*WORDS, "--detach").stdout)
    until(lambda: place.run("logs", run, "--all-ranks").stdout.count("hello") == 2, 10)
    assert place.run("logs", run).stdout.splitlines()[1:] == ["hello from 0"]
    assert place.run("logs", run, "--rank", "1").stdout.splitlines()[1:] == ["hello from 1"]
    assert place.run("logs", run, "--rank", "2").stderr == "airlift: there is no rank 2\nthe job has ranks 0 to 1\n"
    follower = place.start("logs", "-f", run, "--all-ranks")
    out = follower.stdout.readline()
    assert out and follower.poll() is None
    (place.output / "go").write_text("")
    out, err = out + follower.stdout.read(), follower.stderr.read()
    follower.wait(30)
    assert out.count("hello from") == 2 and "[1] airlift: rank 1 ended with exit code " in out
    assert (follower.returncode, err) == (
        1, "airlift: the job failed with exit code 3\nsee python launch.py logs %s\n" % run)
    assert place.run("logs", "-f", run).returncode == 1  # also later
    place.nothing_left()


def test_diff_names_what_is_not_as_it_was_sent(place):
    place.recipe("print('one')", nodes=1)
    old = place.folder / "src/nemotron/recipes/nano3/sft" / "old.py"
    old.write_text("old = 1\n")
    run = run_id(place.run(*WORDS).stdout)
    same = place.run("diff", run)
    assert same.returncode == 0 and same.stdout.endswith("the files are the same\n")
    old.unlink()
    (place.folder / "src/nemotron/recipes/nano3/sft" / "new.py").write_text("new = 1\n")
    place.recipe("print('two')", nodes=1)
    assert "\n-print('one')\n+print('two')\n" in place.run("diff", run).stdout
    said = place.run("diff", run, "--stat").stdout.splitlines()
    assert re.fullmatch(r"run %s carries \d+ files, sha256 \w{12}; here are \d+, sha256 \w{12}" % run, said[0])
    assert [line.rpartition("/")[0::2] for line in said[1:]] == [
        ("changed          src/nemotron/recipes/nano3/sft", "train.py"),
        ("only in the run  src/nemotron/recipes/nano3/sft", "old.py"),
        ("only here        src/nemotron/recipes/nano3/sft", "new.py")]
    told = json.loads(place.run("diff", run, "--json").stdout)
    assert set(told) == {"run", "sha256", "sha256_here", "changed", "only_in_the_run", "only_here"}
    assert told["only_here"] == ["src/nemotron/recipes/nano3/sft/new.py"] and told["sha256"] != told["sha256_here"]
    files = place.state / "runs" / (run + ".files")
    assert files.stat().st_mode & 0o777 == 0o600 and files.stat().st_size < 4096
    files.unlink()
    refused = place.run("diff", run)
    assert refused.returncode == 2 and "cannot be read" in refused.stderr


def test_a_detached_job_ends_by_itself_or_with_its_supervisor(place):
    place.recipe(PROBE)
    run = run_id(place.run(*WORDS, "--detach").stdout)
    until(lambda: not place.left(), 20)
    row = json.loads(place.run("status", run, "--json").stdout)[0]
    assert (row["state"], row["job_exit_code"]) == ("done", 0)

    place.recipe(SLEEP)
    for rank in (0, 1):
        (place.output / ("probe-%d.json" % rank)).unlink()
    run = run_id(place.run(*WORDS, "--detach").stdout)
    place.probes()
    os.kill(place.run_file(run)["record"]["pid"], signal.SIGKILL)
    until(lambda: not place.left(), 20)
    row = json.loads(place.run("status", run, "--json").stdout)[0]
    assert (row["state"], row["detail"], row["job_exit_code"]) == ("failed", "its supervisor was killed", None)
    assert place.run("cancel", run).stdout.endswith(": it had already ended (failed); nothing was done\n")


def test_pods_that_run_are_adopted_by_another_home(place):
    """And not those of another run, nor those that have ended: nothing has what was sent to them."""
    pick = random.Random(5)
    for number in range(int(os.environ.get("AIRLIFT_MANY", "2"))):  # 200 by hand
        place.recipe(SLEEP, nodes=1 + number % 2)
        (place.folder / "src/nemotron/recipes/nano3/sft/data.txt").write_text("x" * pick.randint(0, 20_000))
        for probe in place.output.glob("probe-*.json") if place.output.exists() else ():
            probe.unlink()
        adopted(place, run_id(place.run(*WORDS, "--detach").stdout), 1 + number % 2, "other-%d" % number)


def adopted(place, run, ranks, home):
    place.probes(ranks)
    other = {"AIRLIFT_HOME": str(place.tmp / home)}
    assert run in place.run("adopt", "local", env=other).stdout
    done = place.run("adopt", "local", run, env=other)
    assert done.returncode == 0 and "run %s of nano3/sft" % run in done.stdout, done.stderr
    assert " running " in place.run("status", run, env=other).stdout
    fetched = place.run("fetch", run, str(place.tmp / "there" / run), env=other)
    assert place.run_file(run)["sha256"] in fetched.stdout, fetched.stderr
    assert place.run("cancel", run).returncode == 0
    until(lambda: not place.left(), 20)
    refused = place.run("adopt", "local", run, env={"AIRLIFT_HOME": str(place.tmp / "third" / run)})
    assert refused.returncode == 4 and "no pods of run %s run on this machine" % run in refused.stderr


def test_a_payload_beyond_the_kernel_is_refused_before_anything_starts(place):
    place.recipe(PROBE)
    (place.folder / "src/nemotron/noise.txt").write_bytes(os.urandom(1_600_000))
    done = place.run()
    assert (done.returncode, done.stdout) == (3, "")
    assert re.match(r"airlift: the payload does not fit: environment needs 2,\d+,\d+ of 1,966,080 bytes; "
                    r"nothing was submitted\n"
                    r"leave files out with .* the biggest are src/nemotron/noise\.txt \(1\.5 MiB\)", done.stderr)
    assert len(done.stderr.splitlines()) == 2
    assert not place.state.exists() and not place.output.exists() and place.left() == []


def test_the_largest_payload_that_fits_really_starts(place):
    """The budget is the kernel's: an environment near its limit starts pods, with room for what the pod adds."""
    place.recipe(PROBE)
    (place.folder / "src/nemotron/noise.txt").write_bytes(os.urandom(1_440_000))
    done = place.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert len(place.probes()) == 2


def test_a_state_folder_that_cannot_be_written(place):
    place.recipe(PROBE)
    done = place.run(env={"AIRLIFT_HOME": "/proc/nowhere"})
    assert done.returncode == 2 and done.stderr.splitlines()[0].startswith("airlift: /proc/nowhere")
    assert len(done.stderr.splitlines()) == 2 and place.left() == []


# ---------------------------------------------------------------- several stages


def stage(place, name, yaml):
    """A stage that appends its config to a file, and fails while `fails` is there."""
    recipe(place.folder, name, launch="direct", nodes=1, yaml=yaml, body="""\
        import os, sys
        text = open(os.environ["AIRLIFT_CONFIG"]).read()
        place = os.environ["NEMO_RUN_DIR"] + "/"
        open(place + "said", "a").write(sys.argv[0].split("/")[-2] + " " + " ".join(text.split()) + "|")
        sys.exit(7 if os.path.exists(place + "fails") and "prep" in sys.argv[0] else 0)
        """)


def test_stages_stop_at_the_first_failure_and_go_on_from_there(place):
    stage(place, "nano3/prep", "force: false\n")
    stage(place, "nano3/train", "steps: 9\n")
    place.output.mkdir(parents=True)
    (place.output / "fails").touch()
    words = ("steps=2", "nano3", "prep,train", "local", "force=true", "--nodes", "1", "--", "--name=a b")
    failed = place.run(*words)
    assert failed.returncode == 1 and "the job failed with exit code 7" in failed.stderr
    assert len(failed.stderr.splitlines()) == 2
    hint = failed.stdout.splitlines()[-1]
    assert hint == "to continue from here: python launch.py nano3 prep,train local steps=2 force=true --nodes 1 -- '--name=a b'"
    (place.output / "fails").unlink()
    done = place.run(*shlex.split(hint.split("launch.py ")[1]))
    assert (done.returncode, done.stderr) == (0, "") and "go on" not in done.stdout
    assert (place.output / "said").read_text() == "prep force: true|prep force: true|train steps: 2|"
    place.nothing_left()


def test_an_override_that_no_stage_knows_is_as_for_one_stage(place):
    stage(place, "nano3/prep", "force: false\n")
    stage(place, "nano3/train", "steps: 9\n")
    refused = place.run("nano3", "prep,train", "local", "stepz=2")
    assert (refused.returncode, refused.stdout) == (2, "") and refused.stderr.startswith(
        "airlift: the config has no key stepz\ndid you mean steps?"), "before anything starts"
    done = place.run("nano3", "prep,train", "local", "+stepz=2")
    assert done.returncode == 0 and (place.output / "said").read_text() == (
        "prep force: false stepz: 2|train steps: 9 stepz: 2|")


def test_two_launches_of_one_experiment_are_told_and_a_name_keeps_them_apart(place):
    place.recipe(SLEEP)
    first = run_id(place.run(*WORDS, "--detach").stdout)
    place.probes()
    beside = place.run(*WORDS, "--detach")
    assert "note: run %s goes on and writes to %s too; --name NAME keeps them apart" % (first, place.output) in beside.stdout
    named = place.run(*WORDS, "--detach", "--name", "lr-0.5")
    assert "goes on" not in named.stdout, named.stdout
    until(lambda: (place.folder / "output/lr-0.5/probe-1.json").exists(), 30)
    for run in (first, run_id(beside.stdout), run_id(named.stdout)):
        assert place.run("cancel", run).returncode == 0
    place.nothing_left()
    assert "goes on" not in place.run(*WORDS, "--dry-run").stdout


# ---------------------------------------------------------------- the machine as it is


@pytest.mark.parametrize(("mine", "gpus", "each"), [
    ("2,3", 1, ["2", "3"]), ("3, 2", 1, ["3", "2"]), ("0,1,2,3", 2, ["0,1", "2,3"]), ("GPU-aa,MIG-bb", 1, ["GPU-aa", "MIG-bb"]),
    ("2,3", 0, ["", ""]), ("2,3", "gpu", ["2,3", "2,3"]), (None, 1, ["0", "1"]), (None, 2, ["0,1", "2,3"]), ("5,6,7", 1, ["5", "6"])])
def test_pods_get_the_gpus_that_this_shell_may_use(place, mine, gpus, each):
    place.recipe(PROBE)
    done = place.run(*WORDS, "run.env.gpus_per_node=%s" % gpus, "run.env.nproc_per_node=1",
                     env={} if mine is None else {"CUDA_VISIBLE_DEVICES": mine})
    assert done.returncode == 0, done.stderr
    assert [probe["env"]["CUDA_VISIBLE_DEVICES"] for probe in place.probes()] == each


@pytest.mark.parametrize(("mine", "number"), [("2", 1), ("", 0), ("-1", 0), ("2,-1,3", 1)])
def test_too_few_gpus_are_refused(place, mine, number):
    place.recipe(PROBE)
    done = place.run(*WORDS, "run.env.gpus_per_node=1", env={"CUDA_VISIBLE_DEVICES": mine})
    assert done.returncode == 2 and done.stderr.startswith(
        "airlift: the job needs 2 GPUs, and CUDA_VISIBLE_DEVICES=%s names %d\n" % (mine, number))


def test_a_small_stack_leaves_less_room(place):
    """The kernel gives argv and environment a quarter of it: what does not fit is refused, and what fits starts."""
    def small():
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    place.recipe(PROBE)
    assert place.run(preexec_fn=small).returncode == 0
    (place.folder / "src/nemotron/pad.txt").write_bytes(os.urandom(200_000))
    done = place.run(preexec_fn=small)
    assert done.returncode == 3 and "environment needs" in done.stderr and "of 131,072 bytes" in done.stderr, done.stderr
    assert place.run().returncode == 0


def test_pods_that_cannot_be_started_are_no_traceback(place):
    place.recipe(PROBE)
    (place.tmp / "scratch").rmdir()
    (place.tmp / "scratch").write_text("no folder")
    done = place.run()
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "airlift: the pods cannot be started: %s" % (place.tmp / "scratch") in done.stdout, done.stdout
    assert "exit code 70" in done.stderr


def test_what_is_set_here_and_looks_needed_is_said(place):
    place.recipe(PROBE)
    env = {"https_proxy": "http://p:1", "SSL_CERT_FILE": "/c", "MY_API_KEY": "k" * 20, "PATH_TO_X": "x", "WANDB_MODE": "offline"}
    said = place.run(*WORDS, "--dry-run", "run.env.env_vars.WANDB_MODE=offline", env=env).stdout
    assert "MY_API_KEY, SSL_CERT_FILE, https_proxy are set here and not sent; what the job needs" in said, said
