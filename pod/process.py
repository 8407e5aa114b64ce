"""The recipe's process: its environment, its bash script, and the small init above it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from typing import IO

from pod.failures import CLONE, SETUP, TOOL, Failure, say
from pod.places import Places
from pod.rank import find_master


def recipe_env(env: dict[str, str], job: dict, places: Places, rank: int) -> dict[str, str]:
    """The recipe's environment: the pod's without what is ours, then the user's, then rank and places."""
    result = {name: value for name, value in env.items() if not name.startswith("AIRLIFT_")}
    if job["launch"] == "torchrun":  # a platform's PET_RDZV_BACKEND would overrule torchrun's arguments
        result = {name: value for name, value in result.items() if not name.startswith("PET_")}
    result.setdefault("PYTHONUNBUFFERED", "1")
    if job.get("unpack") == "shared":
        result.setdefault("PYTHONPYCACHEPREFIX", os.path.join(places.base, "pycache"))  # a published tree never changes
    result.update({name: places.fill(value) for name, value in job["env"].items()})
    address, port = find_master(dict(env, **result), job["nodes"])
    paths = [os.path.join(places.code, "src")] + [p for p in result.get("PYTHONPATH", "").split(":") if p]
    result.update({
        "PYTHONPATH": ":".join(paths), "NODE_RANK": str(rank), "NNODES": str(job["nodes"]),
        "MASTER_ADDR": address, "MASTER_PORT": port, "NEMO_RUN_DIR": places.run_root,
        "AIRLIFT_RUN": job["run"], "AIRLIFT_CODE": places.code, "AIRLIFT_CONFIG": places.config,
    })
    return result


# A server may refuse a commit that is no tip of a branch; then all branches are fetched.
CLONE_SCRIPT = """\
(rm -rf {target}.new && git init -q {target}.new && cd {target}.new && {{
   git fetch -q --depth 1 {url} {ref} && git checkout -q FETCH_HEAD || {{
     git fetch -q --tags {url} '+refs/heads/*:refs/remotes/origin/*' && git checkout -q {ref}; }}; }} &&
 cd / && rm -rf {target} && mv {target}.new {target} &&
 echo airlift: {target} is $(git -C {target} rev-parse HEAD)
) || {{ echo 'airlift: no clone of '{shown}' at '{ref} >&2; exit {code}; }}"""


def script_for(job: dict, workdir: str, ready: int) -> str:
    """The one bash script: startup commands, then the recipe. Between them a byte goes to the descriptor `ready`, which
    tells whose exit code it is. When TERM arrives, a bash with a trap waits for the command that runs and goes on from
    there: to its end, with the recipe's own code, if that was the last one; else it exits, or a TERM between two
    commands would be lost."""
    lines = ["trap 'exit 143' TERM; trap 'exit 130' INT", "cd -- %s || exit %d" % (shlex.quote(workdir), TOOL)]
    for clone in job.get("clones", []):
        words = dict(clone, shown=re.sub(r"(https?://)[^/@]+@", r"\1***@", clone["url"]))
        lines.append(CLONE_SCRIPT.format(code=CLONE, **{name: shlex.quote(value) for name, value in words.items()}))
    for number, command in enumerate(job["setup"], 1):
        lines.append("eval %s || { echo 'airlift: startup command %d failed with exit code '$? >&2; exit %d; }"
                     % (shlex.quote(command), number, SETUP))
    if job.get("tool"):
        tool = shlex.quote(job["tool"])
        lines.append("command -v %s >/dev/null || { echo 'airlift: there is no '%s' in this image' >&2; exit %d; }"
                     % (tool, tool, TOOL))
    lines += ["trap AIRLIFT_TERM=143 TERM; trap AIRLIFT_TERM=130 INT",
              "trap '[ -z \"${AIRLIFT_TERM:-}\" ] || exit $AIRLIFT_TERM' DEBUG",
              "echo >&%d; exec %d>&-" % (ready, ready), job["command"]]
    return "\n".join(lines) + "\n"


class Child:
    """The bash that runs the recipe, in a process group of its own, and the signals for it."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.signal = 0  # the last one that came
        for number in self.SIGNALS:
            signal.signal(number, self.forward)
        signal.signal(signal.SIGALRM, self.remind)

    def forward(self, number: int, _frame: object) -> None:
        """Give a signal to bash and all it runs. If it runs nothing right now, it may be about to: see remind."""
        self.signal = number
        if self.process is None:
            raise SystemExit(128 + number)
        if not children_of(self.process.pid):
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        with contextlib.suppress(OSError):  # it has ended, or now belongs to another user
            os.killpg(self.process.pid, number)

    def remind(self, _number: int, _frame: object) -> None:
        """Give the signal to what bash started just as it came: bash waits for that first, and would heed it later."""
        children = children_of(self.process.pid) if self.process else {}
        for pid in children:
            with contextlib.suppress(OSError):
                os.kill(pid, self.signal)
        if children:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def run(self, script: str, env: dict[str, str], log: str | None, ready: int) -> int:
        """Run bash to its end; its output also goes to the file `log`. Returns its code, 128+N if signal N ended it."""
        become_subreaper()
        # A signal that came while bash is being started would find nobody to go to: it waits until there is.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            self.process = subprocess.Popen(
                ["bash", "-c", script], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if log else None,
                stderr=subprocess.STDOUT if log else None, start_new_session=True, pass_fds=(ready,),
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS))
        except FileNotFoundError:
            raise Failure(TOOL, "there is no bash in this image") from None
        except OSError as error:
            raise Failure(TOOL, "bash cannot be started: %s" % error.strerror) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
            os.close(ready)
        pump = None
        try:
            if log and self.process.stdout:
                pump = threading.Thread(target=copy_output, args=(self.process.stdout, log), daemon=True)
                pump.start()
            return reap(self.process.pid)
        finally:
            end_the_rest()
            if pump:
                pump.join(5)  # a daemon that escaped may hold the pipe open for ever


def copy_output(pipe: IO[bytes], log: str | None) -> None:
    """Pass bytes on as they come. A log that cannot be written (full disk) is said once, and the recipe goes on; so it
    does when nobody reads our output any more: the pipe must be emptied, or the recipe would stand still."""
    try:
        file = open(log, "ab", buffering=0) if log else None
    except OSError as error:
        say("the log %s cannot be kept: %s" % (log, error.strerror))
        file = None
    while True:
        data = os.read(pipe.fileno(), 65536)
        if not data:
            return
        try:
            if file:
                file.write(data)
        except OSError as error:
            say("the log %s ends here: %s" % (log, error.strerror))
            file = None
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(1, data):]


def become_subreaper() -> None:
    """Have orphans handed to us, as to process 1. Only Linux can, and only with ctypes; without it they go to init."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap(pid: int) -> int:
    """Wait for `pid`, and meanwhile for every orphan, as process 1 must."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def end_the_rest(grace: float = 5.0) -> None:
    """End what the recipe left running: TERM, then KILL after `grace` seconds, until no child is left. What even KILL
    does not end (a file system that hangs) is left after twice the time."""
    deadline = time.monotonic() + grace
    told: set[int] = set()
    while time.monotonic() < deadline + grace:
        late = time.monotonic() > deadline
        for pid in children_of(os.getpid()):
            if late or pid not in told:
                told.add(pid)
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        except ChildProcessError:
            return


def children_of(parent: int) -> dict[int, str]:
    """The children of a process, pid -> name: not every kernel has /proc/<pid>/task/<pid>/children."""
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(ValueError, OSError):  # not a process, or no longer
            with open("/proc/%d/stat" % int(name), "rb") as file:
                head, _, rest = file.read().rpartition(b")")
            if int(rest.split()[1]) == parent:
                found[int(name)] = head.partition(b"(")[2].decode("utf-8", "replace")
    return found
