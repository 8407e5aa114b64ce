"""pod/process.py: signals, codes and leftovers of the recipe, its script and its environment. Real processes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ENDED, SCRIPT, failed, job, need, plan, plant, ran, started, tree, until

import transport
from pod import failures, process
from pod.places import Places
from transport import plan_for

# ---------------------------------------------------------------- the recipe's end


@pytest.mark.parametrize("command, code", [
    ("true", 0), ("exit 3", 3), ("exit 255", 255), ("python -c 'import sys; sys.exit(7)'", 7), ("kill -KILL $$", 137),
    ("kill -SEGV $$", 139), ("set -eu; true; exit 5", 5), ("sleep 0 & wait; exit 6", 6),
    ("python -c 'import os; os.abort()'", 134),
    ("python -c 'import os; os.kill(os.getpid(), 9)'", 137), ("exec python -c 'import sys; sys.exit(9)'", 9),
    ("exit 86", 86), ("exit 87", 87), ("exit 80", 80), ("no-such-program", 127), ("false", 1), ("if", 2),
    ("false; true", 0),
])
def test_the_exit_code_is_the_recipes(tmp_path: Path, command: str, code: int) -> None:
    found, out = ran(plan(command=command), tmp_path)
    assert found == code
    assert out.text.endswith(ENDED % ("0", code)) and "what to do" not in out.text
    if code == 86:
        found, out = ran(plan(command=command, setup=["true"], tool="bash", run_root=str(tmp_path / "ws")), tmp_path)
        assert found == code and "what to do" not in out.text


READY = "import signal, sys, time, os\nprint('READY', flush=True)\n"
ENDS_ITSELF = READY.replace("print", "signal.signal(signal.{0}, lambda *_: (print('GOT IT'), sys.exit(7)))\nprint")
ENDS_ITSELF += "time.sleep(30)"
IGNORES = READY.replace("print", "signal.signal(signal.{0}, signal.SIG_IGN)\nprint") + "time.sleep(0.7); sys.exit(9)"
DEFAULT = READY + "time.sleep(30)"


@pytest.mark.parametrize("workspace", [False, True])
@pytest.mark.parametrize("number, recipe, code", [
    (signal.SIGTERM, ENDS_ITSELF, 7), (signal.SIGINT, ENDS_ITSELF, 7), (signal.SIGTERM, IGNORES, 9),
    (signal.SIGINT, IGNORES, 9), (signal.SIGTERM, DEFAULT, 143), (signal.SIGINT, DEFAULT, 130),
    *((number, *what) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
      for what in ((ENDS_ITSELF, 7), (IGNORES, 9), (DEFAULT, 128 + number))),
])
def test_signals_reach_the_recipe(tmp_path: Path, number: signal.Signals, recipe: str, code: int,
                                  workspace: bool) -> None:
    whole = plan({SCRIPT: recipe.format(number.name).encode()}, command='python "$AIRLIFT_CODE"/%s' % SCRIPT,
                 run_root=str(tmp_path / "ws") if workspace else None)
    with started(whole, tmp_path / "scratch") as running:
        running.until(b"READY\n")
        assert running.signal(number) == code
        assert running.text.endswith(ENDED % ("0", code))
        assert ("GOT IT" in running.text) == (recipe is ENDS_ITSELF)
        assert not running.alive()


def test_a_signal_reaches_the_recipe_even_if_it_was_ignored_when_the_pod_began(tmp_path: Path) -> None:
    """As after `nohup`, or in the background of a shell."""
    whole = plan({SCRIPT: ENDS_ITSELF.format("SIGINT").encode()}, command='python "$AIRLIFT_CODE"/%s' % SCRIPT)
    with started(whole, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as running:
        running.until(b"READY\n")
        assert running.signal(signal.SIGINT) == 7


SAVES = READY.replace("print", "signal.signal(signal.SIGUSR1, lambda *_: print('SAVED', flush=True))\nprint", 1) + """
import pathlib
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
"""


def test_a_recipe_that_saves_on_usr1_goes_on(tmp_path: Path) -> None:
    command = 'python "$AIRLIFT_CODE"/%s %s; echo "then $?"' % (SCRIPT, tmp_path / "go")
    with started(plan({SCRIPT: SAVES.encode()}, command=command), tmp_path / "scratch") as running:
        running.until(b"READY\n")
        for _ in range(2):
            os.kill(running.process.pid, signal.SIGUSR1)
            running.until(b"SAVED\n")
            running.output = b""
        (tmp_path / "go").touch()
        assert running.end() == 0 and "then 0" in running.text, running.text


def test_term_while_it_unpacks(tmp_path: Path) -> None:
    files = {"src/p/m%04d.py" % number: b"x" * 50 for number in range(4000)}
    with started(plan(files, command="echo RECIPE RAN; sleep 30"), tmp_path) as running:
        until(lambda: any(tmp_path.glob("airlift-*/*/code.*/src/p")))
        assert running.signal(signal.SIGTERM) == 143
        assert "RECIPE RAN" not in running.text and "Traceback" not in running.text
        assert running.text == ("airlift: rank 0: ended by a signal before the recipe was started\n"
                                + ENDED % ("0", 143))
        assert not any(tmp_path.glob("airlift-*/*/code*")), "what was begun is taken away"


def test_term_during_a_startup_command(tmp_path: Path) -> None:
    with started(plan(setup=["echo READY", "sleep 30"], command="echo RECIPE RAN"), tmp_path) as running:
        running.until(b"READY\n")
        assert running.signal(signal.SIGTERM) == 143
        assert "RECIPE RAN" not in running.text and "what to do" not in running.text
        assert running.text.endswith(ENDED % ("0", 143))


@pytest.mark.parametrize("spread", range(10))
def test_term_at_any_moment_leaves_nothing_running(tmp_path: Path, spread: int) -> None:
    with started(plan(setup=["true"], command="sleep 30", run_root=str(tmp_path / "ws")),
                 tmp_path / "scratch") as running:
        time.sleep(0.02 + 0.016 * spread)
        code = running.signal(signal.SIGTERM)
        assert code == 143, running.text
        assert not running.alive()
        assert "Traceback" not in running.text


def test_term_while_bash_is_about_to_start_something(tmp_path: Path) -> None:
    """What was not there when the signal came did not hear it; bash waits for that, and would heed its trap later."""
    command = "trap : TERM; trap - DEBUG; kill -TERM $PPID; for ((i = 0; i < 300000; i++)); do :; done; sleep 30"
    with started(plan(command=command), tmp_path) as running:
        assert running.end(15) == 143


@pytest.mark.parametrize("command, code", [
    ("sh -c 'kill -TERM $PPID; sleep 0.1; exit 0'; echo GOES ON", 143),
    ("sh -c 'kill -TERM $PPID; sleep 0.1; exit 5'", 5),
    ("sh -c 'kill -TERM $PPID; sleep 0.1; exit 0'", 0), ("until sh -c 'echo TRY; sleep 30'; do :; done", 143),
    ("sleep 30 & echo TRY; wait", 143), ("sh -c 'echo TRY; exec sleep 30' | cat", 143),
    ("trap 'echo SAVED; exit 4' TERM; sh -c 'echo TRY; exec sleep 30'; exit 5", 4),
])
def test_term_and_recipes_of_several_commands(tmp_path: Path, command: str, code: int) -> None:
    """The command that was running ends with its own code; no further one begins."""
    with started(plan(command=command, setup=["set -eu"]), tmp_path) as running:
        if "TRY" in command:
            running.until(b"TRY\n")
            time.sleep(0.1)
            os.kill(running.process.pid, signal.SIGTERM)
        assert running.end(15) == code, running.text
        assert "GOES ON" not in running.text and running.text.count("TRY") <= 1
        assert ("SAVED" in running.text) == ("SAVED" in command)


TERM_AT_THE_WORST = """
import os, runpy, signal, subprocess, sys
real = subprocess.Popen
class Popen(real):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen = Popen
sys.argv = [{0!r}]
runpy.run_path({0!r}, run_name="__main__")
"""


def test_term_between_the_start_of_bash_and_the_news_of_it(tmp_path: Path) -> None:
    whole = plan(command="sleep 30")
    (tmp_path / "pod.py").write_bytes(whole.program)
    code = TERM_AT_THE_WORST.format(str(tmp_path / "pod.py"))
    with started(whole, tmp_path / "scratch", argv=[sys.executable, "-c", code]) as running:
        assert running.end() == 143
        assert not running.alive(), "bash would go on alone"


DAEMON = r"""
import os, sys, time, signal
def daemon(*, ignore):
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    if ignore:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("DAEMON", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_nothing_the_recipe_starts_is_left(tmp_path: Path, stubborn: bool) -> None:
    """Children in the background and daemons that forked twice, in sessions of their own. TERM is enough for most; what
    ignores it, or was stopped, is killed after five seconds."""
    recipe = DAEMON + "daemon(ignore=False); daemon(ignore=%r); time.sleep(0.3); sys.exit(3)" % stubborn
    command = ("sleep 61 & setsid sleep 62 & (sleep 63 &) ; nohup sleep 64 >/dev/null 2>&1 & sleep 65 & %s\n"
               'python "$AIRLIFT_CODE"/%s' % ("kill -STOP $!" if stubborn else "", SCRIPT))
    begin = time.monotonic()
    root = str(tmp_path / "ws") if stubborn else None
    with started(plan({SCRIPT: recipe.encode()}, command=command, run_root=root), tmp_path / "scratch") as running:
        assert running.end() == 3
        assert running.text.count("DAEMON") == 2
        assert not running.alive()
        assert (time.monotonic() - begin > 4.5) == stubborn


def test_orphans_are_reaped_while_the_recipe_runs(tmp_path: Path) -> None:
    command = ("for i in 1 2 3 4 5; do (sh -c 'sleep 0.05' &); done; sleep 0.4\n"
               "cat /proc/[0-9]*/stat 2>/dev/null | awk '$4 == '$PPID")
    code, out = ran(plan(command=command), tmp_path)
    assert code == 0
    states = re.findall(r"^\d+ \(.*\) (\w) ", out.text, re.MULTILINE)
    assert states == ["S"], "only bash itself is a child of the pod, and none is a zombie: " + out.text


def as_process_1(whole: transport.Plan) -> list[str]:
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    seen = subprocess.run([*argv, "true"], capture_output=True)
    need(seen.returncode == 0, "no PID namespaces here: %s" % seen.stderr.decode())
    return [*argv, *whole.argv]


def test_as_process_1_of_a_pod(tmp_path: Path) -> None:
    """TERM works, though the kernel ignores it for a process 1 that does not handle it, and zombies are reaped."""
    recipe = DAEMON + (
        "print('PARENT OF BASH', open('/proc/%d/stat' % os.getppid()).read().split()[3], flush=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "for _ in range(5):\n    os.system('(sleep 0.01 &)')\n"
        "daemon(ignore=False)\ntime.sleep(0.3)\n"
        "stats = [open('/proc/%s/stat' % pid).read() for pid in os.listdir('/proc') if pid.isdigit()]\n"
        "print('ZOMBIES', sum(') Z ' in stat for stat in stats), flush=True)\ntime.sleep(30)")
    whole = plan({SCRIPT: recipe.encode()}, command='python "$AIRLIFT_CODE"/' + SCRIPT, run_root=str(tmp_path / "ws"))
    with started(whole, tmp_path / "scratch", argv=as_process_1(whole)) as running:
        running.until(b"ZOMBIES 0\n")
        assert b"PARENT OF BASH 1\n" in running.output
        inner = Path("/proc/%d/task/%d/children" % (running.process.pid, running.process.pid)).read_text().split()
        os.kill(int(inner[0]), signal.SIGTERM)
        assert running.end() == 7
        assert running.text.endswith(ENDED % ("0", 7))
        assert not running.alive()


# ---------------------------------------------------------------- startup commands and what is missing


def test_startup_commands_share_one_bash(tmp_path: Path) -> None:
    plant(tmp_path, {"env.sh": "export SOURCED='a b'\nfunc() { echo \"FUNC $1\"; }\n"})
    setup = ["export A=1 B='x y'", "source %s" % (tmp_path / "env.sh"), "cd /", "local_only=2", "false || true",
             "cat <<'E'\nhere 'doc' $A\nE", "exec 3>&1 5>&1", "set -o noclobber"]
    command = "func \"$A/$B/$SOURCED/$local_only\"; pwd; python -c 'import os; print(os.environ[\"B\"])'"
    code, out = ran(plan(setup=setup, command=command), tmp_path / "scratch")
    assert code == 0
    assert "here 'doc' $A\nFUNC 1/x y/a b/2\n/\nx y\n" in out.text


@pytest.mark.parametrize("command", [
    "echo THIS IS WHY >&2; false", "echo THIS IS WHY; exit 0", "echo THIS IS WHY; exit 3", "echo THIS IS WHY; exit 200",
    "echo THIS IS WHY\nif", "echo THIS IS WHY; kill -KILL $$", "echo THIS IS WHY; exec false",
    "set -e; echo THIS IS WHY; false", "echo THIS IS WHY; (exit 87)", "echo THIS IS WHY; kill -TERM $$; false",
])
@pytest.mark.parametrize("workspace", [False, True])
def test_a_startup_command_that_fails(tmp_path: Path, command: str, workspace: bool) -> None:
    root = str(tmp_path / "ws") if workspace else None
    code, out = ran(plan(setup=["true", command, "echo RECIPE RAN"], command="echo RECIPE RAN", run_root=root),
                    tmp_path / "scratch")
    assert code == failures.SETUP, out.text
    failed(code, out)
    assert "THIS IS WHY\n" in out.text
    if workspace:
        assert (tmp_path / "ws/runs/t23456/rank-0.exit").read_text() == "86\n"
        assert "THIS IS WHY" in (tmp_path / "ws/runs/t23456/rank-0.log").read_text()


def test_which_startup_command_failed(tmp_path: Path) -> None:
    code, out = ran(plan(setup=["true", "(exit 5)"], command="echo RECIPE RAN"), tmp_path)
    assert code == failures.SETUP and "airlift: startup command 2 failed with exit code 5\n" in out.text


@pytest.mark.parametrize("tool", ["torchrun-not-here", "/no/such/tool", "it's"])
def test_a_tool_that_is_missing(tmp_path: Path, tool: str) -> None:
    code, out = ran(plan(tool=tool, command="echo RECIPE RAN"), tmp_path)
    assert code == failures.TOOL
    failed(code, out)
    assert "airlift: there is no %s in this image\n" % tool in out.text


def test_a_tool_that_a_startup_command_brings(tmp_path: Path) -> None:
    plant(tmp_path, {"bin/brought": "#!/bin/sh\nexit 6\n"})
    (tmp_path / "bin/brought").chmod(0o755)
    code, _ = ran(plan(tool="brought", command="brought", setup=["PATH=%s/bin:$PATH" % tmp_path]), tmp_path / "scratch")
    assert code == 6


def test_working_directories(tmp_path: Path) -> None:
    code, out = ran(plan(workdir="/no/such folder", command="echo RECIPE RAN"), tmp_path)
    assert code == failures.TOOL and "/no/such folder" in failed(code, out)
    (tmp_path / "it's a dir").mkdir()
    for workdir, found in (("%s/it's a dir" % tmp_path, "%s/it's a dir" % tmp_path),
                           ("/nemo_run/code/src", "%s/src" % out.code),
                           ("src/pkg", "%s/src/pkg" % out.code), (None, str(out.code))):
        code, out = ran(plan(workdir=workdir, command="pwd", setup=["pwd"]), tmp_path)
        assert code == 0 and out.text.count("\n%s\n" % found) in (1, 2) and out.text.count(found + "\n") >= 2, out.text


def test_an_image_without_bash(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path / "scratch", env={"PATH": str(tmp_path / "bin")})
    assert code == failures.TOOL and failed(code, out) == "there is no bash in this image"
    (tmp_path / "bin/bash").write_text("no program")
    (tmp_path / "bin/bash").chmod(0o755)
    code, out = ran(plan(command="echo RECIPE RAN"), tmp_path / "scratch", env={"PATH": str(tmp_path / "bin")})
    assert code == failures.TOOL and "Exec format error" in failed(code, out)


def test_an_environment_too_large_for_the_recipe(tmp_path: Path) -> None:
    """plan_for refuses it, but an image may add what nobody knew of."""
    env = {"V%02d" % number: "x" * 100_000 for number in range(18)}
    code, out = ran(plan(command="echo RECIPE RAN", env={"W%02d" % number: "y" * 100_000 for number in range(18)}),
                    tmp_path, env=env)
    assert code == failures.TOOL and "Argument list too long" in failed(code, out)


@pytest.mark.parametrize("module, compression, code", [
    ("lzma", "xz", failures.PYTHON), ("lzma", "gz", 0), ("gzip", "gz", failures.PYTHON), ("ctypes", "xz", 0),
])
def test_a_python_that_lacks_a_module(tmp_path: Path, module: str, compression: str, code: int) -> None:
    plant(tmp_path / "lib", {module + ".py": "raise ImportError('built without it')\n"})
    whole = plan_for("local", tree(), job(command="true" if code == 0 else "echo RECIPE RAN"), compression=compression)
    found, out = ran(whole, tmp_path / "scratch", env={"PYTHONPATH": str(tmp_path / "lib")})
    assert found == code, out.text
    if code:
        assert failed(code, out) == "this Python has no %s: built without it" % compression


# ---------------------------------------------------------------- the recipe's environment


def environment_of(whole: transport.Plan, scratch: Path, **env: str | None) -> dict[str, str]:
    code, out = ran(whole, scratch, env=env)
    assert code == 0, out.text
    data = (out.code.parent / "output/env").read_bytes()
    return dict(item.split("=", 1) for item in data.decode("utf-8", "surrogateescape").split("\0") if item)


DUMP = 'env -0 > "$NEMO_RUN_DIR"/env'
USER = {"SPACES": " a  b ", "QUOTES": "'\"`", "DOLLAR": "$HOME ${X} $(id) $$", "KUBE": "$(NODE_RANK)", "EMPTY": "",
        "LINES": "a\nb\n\n", "UNI": "größe データ \U0001f680", "BACK": "\\n\\", "GLOB": "* ? [a]", "EQUAL": "a=b=c",
        "lower.dot-ted": "1", "HASH": "# no"}


def test_the_users_environment_arrives_as_it_is(tmp_path: Path) -> None:
    found = environment_of(plan(env=USER, command=DUMP), tmp_path)
    assert {name: found.get(name) for name in USER} == USER


@settings(max_examples=8)
@given(st.dictionaries(st.from_regex(r"U[A-Z0-9_]{0,8}", fullmatch=True), max_size=5, values=st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30).filter(
        lambda text: "/nemo_run" not in text)))  # a place, which the pod fills in
def test_any_environment_arrives_as_it_is(env: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = environment_of(plan(env=env, command=DUMP), Path(name))
        assert {key: found.get(key) for key in env} == env


def test_what_else_is_in_the_recipes_environment(tmp_path: Path) -> None:
    image = {"PYTHONPATH": "/opt/image::/opt/more", "PET_NODE_RANK": "0", "PET_NNODES": "1", "FROM_IMAGE": "x",
             "AIRLIFT_OTHER": "y",
             "ODD": "\udcff"}
    whole = plan(command=DUMP, env={"WHERE": "/nemo_run/x:/nemo_run/code"})
    found = environment_of(whole, tmp_path / "scr", **image)
    base = support.base(tmp_path / "scr", whole.digest)
    assert {name: value for name, value in found.items() if "AIRLIFT" in name} == {
        "AIRLIFT_RUN": "t23456", "AIRLIFT_CODE": str(base / "code"), "AIRLIFT_CONFIG": str(base / "config.yaml")}
    assert found["PYTHONPATH"] == "%s/code/src:/opt/image:/opt/more" % base
    assert found["NODE_RANK"] == "0" and found["NNODES"] == "1" and found["MASTER_ADDR"] == "127.0.0.1"
    assert found["MASTER_PORT"].isdigit() and found["PYTHONUNBUFFERED"] == "1"
    assert found["NEMO_RUN_DIR"] == str(base / "output") and found["WHERE"] == "%s/output/x:%s/code" % (base, base)
    assert found["FROM_IMAGE"] == "x" and found["ODD"] == "\udcff" and found["PET_NNODES"] == "1"


def test_a_default_gives_way_to_the_pods_own_environment_and_to_the_user(tmp_path: Path) -> None:
    whole = plan(command=DUMP, defaults={"HF_HOME": "/nemo_run/hf", "CACHE": "/ours", "KEPT": "ours", "NONE": "ours"},
                 env={"CACHE": "/users", "KEPT": "users"}, folders=["/nemo_run/made"])
    found = environment_of(whole, tmp_path / "a", KEPT="image", NONE="")
    assert found["HF_HOME"] == found["NEMO_RUN_DIR"] + "/hf"
    assert (found["CACHE"], found["KEPT"], found["NONE"]) == ("/users", "users", "")
    assert Path(found["NEMO_RUN_DIR"], "made").is_dir()
    code, out = ran(whole, tmp_path / "b", env={"HF_HOME": "/image/hf", "CACHE": "/image"})
    assert code == 0 and "airlift: left as this pod has them: HF_HOME\n" in out.text


NAMES = st.sampled_from(["HF_HOME", "WANDB_NAME", "A", "B", "C", "D"])
ENVIRONMENT = st.dictionaries(NAMES, st.text("ab", max_size=2), max_size=6)


@given(ENVIRONMENT, ENVIRONMENT, ENVIRONMENT)
def test_the_user_wins_over_the_place_and_the_place_over_defaults(user: dict[str, str], place: dict[str, str],
                                                                  ours: dict[str, str]) -> None:
    described = job(env=user, defaults=ours, tree={"sha256": "d" * 64})
    found = process.recipe_env(place, described, Places(described, place, "/base"), 0)
    assert {name: found.get(name) for name in {*user, *place, *ours}} == ours | place | user


def test_torchrun_sees_no_pet_variables(tmp_path: Path) -> None:
    image = {"PET_NODE_RANK": "1", "PET_RDZV_BACKEND": "c10d", "PET_MASTER_ADDR": "job-master-0",
             "PET_MASTER_PORT": "99"}
    found = environment_of(plan(command=DUMP, launch="torchrun", nodes=2), tmp_path, **image)
    assert not [name for name in found if name.startswith("PET_")]
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("job-master-0", "99")
    assert (found["NODE_RANK"], found["NNODES"]) == ("1", "2")


def test_the_user_can_say_where_rank_0_is_but_not_which_rank_this_is(tmp_path: Path) -> None:
    env = {"MASTER_ADDR": "mine", "MASTER_PORT": "1", "NODE_RANK": "7", "PYTHONPATH": "/mine", "AIRLIFT_RUN": "x",
           "PYTHONUNBUFFERED": ""}
    found = environment_of(plan(command=DUMP, env=env, nodes=2), tmp_path, NODE_RANK="1", MASTER_ADDR="theirs")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["NODE_RANK"]) == ("mine", "1", "1")
    assert found["PYTHONPATH"].endswith("/code/src:/mine") and found["AIRLIFT_RUN"] == "t23456"
    assert found["PYTHONUNBUFFERED"] == ""


def test_the_recipe_inherits_no_descriptor_and_no_terminal(tmp_path: Path) -> None:
    code, out = ran(plan(command="ls -l /proc/self/fd; cat"), tmp_path, stdin=subprocess.PIPE)
    assert code == 0
    links = re.findall(r" (\d+) -> (\S+)", out.text)
    assert [name for name, _ in links] == ["0", "1", "2", "3"] and links[0][1] == "/dev/null", out.text


# ---------------------------------------------------------------- lines that are drawn again and again


def passed(pieces: list[bytes], at: list[float] | None = None) -> bytes:
    """What goes out for pieces that come at those times, all of them at once without."""
    redrawn, out = process.Redrawn(), []
    with pytest.MonkeyPatch.context() as patch:
        for piece, now in zip([*pieces, b""], at or [1.0] * (len(pieces) + 1), strict=True):
            patch.setattr(process.time, "monotonic", lambda now=now: now)
            out.append(redrawn.pass_on(piece))
    return b"".join(out)


@pytest.mark.parametrize("pieces, out", [
    ([b"a\nb\n"], b"a\nb\n"), ([b"a\r\nb\r\n"], b"a\r\nb\r\n"), ([b"no end"], b"no end"), ([b"\n\n"], b"\n\n"),
    ([b"begun ", b"done\n", b"x\n"], b"begun done\nx\n"), ([b"\rbar 1\rbar 2\rbar 3\nend\n"], b"bar 3\nend\n"),
    ([b"\rbar 1", b"\rbar 2", b"\rbar 3", b"\n"], b"bar 1\nbar 3\n"), ([b"loading", b"\rbar 1", b"\rbar 2"], b"loading\nbar 1\nbar 2\n"),
    ([b"bar 1\r", b"bar 2\r", b"\n"], b"bar 1\nbar 2\n"), ([b"a\r", b"\nb\n"], b"a\nb\n"), ([b"\r\r\r\n"], b""),
    ([b"\rbar 1\r", b"text\n"], b"bar 1\ntext\n")])
def test_a_progress_bar_becomes_a_few_lines(pieces: list[bytes], out: bytes) -> None:
    assert passed(pieces) == out


def test_a_bar_of_an_hour_is_seen_live_and_does_not_fill_the_log() -> None:
    bars = [b"\r%5d/36000 |####|" % number for number in range(36_000)]
    out = passed(bars, [number / 10 for number in range(36_001)]).splitlines()
    assert 350 < len(out) < 365 and out[0].startswith(b"    0/") and out[-1].startswith(b"35999/")
    assert out == sorted(out)


@given(st.lists(st.binary(max_size=20).map(lambda text: text.replace(b"\r", b"")), max_size=8))
def test_without_a_carriage_return_nothing_changes(pieces: list[bytes]) -> None:
    assert passed([piece for piece in pieces if piece]) == b"".join(pieces)


@given(st.lists(st.sampled_from([b"a", b"bb", b"\r", b"\n", b"\r\n", b"ccc"]), max_size=12), st.integers(1, 4))
def test_no_line_is_lost_however_the_output_is_cut(words: list[bytes], size: int) -> None:
    """Each line that ends says its last state, and comes in the same order."""
    text = b"".join(words)
    out = passed([text[at:at + size] for at in range(0, len(text), size)])
    states = [[part for part in line.split(b"\r") if part] for line in text.split(b"\n")]
    wanted = [line[-1] for line in states if line]
    found = iter(out.replace(b"\r", b"").split(b"\n"))
    assert all(any(line.endswith(want) for line in found) for want in wanted), (text, out)


def test_a_bar_is_in_the_output_and_in_the_log_of_the_workspace(tmp_path: Path) -> None:
    body = "import sys, time\nfor i in range(50):\n    sys.stderr.write('\\rstep %d of 50' % i); sys.stderr.flush(); time.sleep(0.01)\n"
    whole = plan({SCRIPT: body.encode()}, run_root=str(tmp_path / "ws"), command='python "$AIRLIFT_CODE"/%s; sleep 30' % SCRIPT)
    with started(whole, tmp_path / "scratch") as running:
        running.until(b"step 0 of 50\n")
        assert running.signal(signal.SIGTERM) == 143
    log = (tmp_path / "ws/runs/t23456/rank-0.log").read_text()
    assert log == "step 0 of 50\nstep 49 of 50\n" or (log.count("\n") < 4 and "\r" not in log)


def test_ray_keeps_out_of_the_folder_of_another_user(tmp_path: Path) -> None:
    """Ray's default is one folder for all users of a machine, which belongs to the first one."""
    need(os.geteuid() == 0, "only root becomes another user")
    scratch = Path(tempfile.mkdtemp(dir="/tmp", prefix="s"))
    try:
        scratch.chmod(0o777)
        (scratch / "ray").mkdir(mode=0o755)
        for place in ("/tmp/airlift-65534/ray", ""):
            code, out = ran(plan(command='echo "its place: $RAY_TMPDIR"', run_root=None), scratch, user=65534, group=65534)
            assert code == 0 and re.search(r"its place: %s(-\d+)?\n" % place, out.text), out.text
            shutil.rmtree(scratch / "ray", ignore_errors=True)
    finally:
        shutil.rmtree(scratch)


def test_rays_sockets_fit_below_any_tmpdir(tmp_path: Path) -> None:
    """A socket's path has 107 bytes at most, of which Ray takes 72. Nothing of it stays."""
    deep = tmp_path / ("d" * 60)
    for environment, short in (({}, True), ({"RAY_TMPDIR": "/mine"}, False)):
        found = environment_of(plan(command=DUMP, env=environment), deep)
        place = found["RAY_TMPDIR"]
        assert (place == "/mine") != short and len(place) <= 35 and not (short and os.path.exists(place))
