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
import urllib.parse
from typing import IO

from pod.failures import CLONE, SETUP, TOOL, Failure, hide, say
from pod.places import Places
from pod.rank import find_master


def recipe_env(env: dict[str, str], job: dict, places: Places, rank: int) -> dict[str, str]:
    """The recipe's environment: the pod's without what is ours, then the user's, then rank and places. Defaults only
    where neither has the name: what image, cluster or platform have set is known to be right there."""
    result = {name: value for name, value in env.items() if not name.startswith("AIRLIFT_")}
    if job["launch"] == "torchrun":  # a platform's PET_RDZV_BACKEND would overrule torchrun's arguments
        result = {name: value for name, value in result.items() if not name.startswith("PET_")}
    result.setdefault("PYTHONUNBUFFERED", "1")
    if job.get("unpack") == "shared":
        result.setdefault("PYTHONPYCACHEPREFIX", os.path.join(places.base, "pycache"))  # a published tree never changes
    result.update({name: places.fill(value) for name, value in job["env"].items()})
    result = dict({name: places.fill(value) for name, value in job.get("defaults", {}).items()}, **result)
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
({env}
 rm -rf {target}.new && git init -q {target}.new && cd {target}.new && {{
   git fetch -q --depth 1 {url} {ref} && git checkout -q FETCH_HEAD || {{
     git fetch -q --tags {url} '+refs/heads/*:refs/remotes/origin/*' && git checkout -q {ref}; }}; }} &&
 cd / && rm -rf {target} && mv {target}.new {target} &&
 echo airlift: {target} is $(git -C {target} rev-parse HEAD)
) || {{ echo 'airlift: no clone of '{shown}' at '{ref} >&2; exit {code}; }}"""


def without_login(url: str, number: int = 0) -> tuple[str, dict[str, str]]:
    """A repository's URL without name and password, and the environment that gives them to git: an argv can be read by
    all users of the machine, and git hands the URL on to programs of its own, also one that insteadOf has changed."""
    found = re.fullmatch(r"(.*?)(\w+://)([^/\s]+)@([^/\s]+)(.*)", url)
    if not found or not found.group(2).startswith(("http", "ftp")):  # ssh has no passwords in URLs
        return url, {}
    name, _, word = found.group(3).partition(":")
    mine = "AIRLIFT_LOGIN_%d" % number, "AIRLIFT_WORD_%d" % number
    return found.expand(r"\1\2\4\5"), {
        "GIT_CONFIG_KEY_%d" % number: "credential.%s.helper" % found.expand(r"\2\4"),
        "GIT_CONFIG_VALUE_%d" % number: '!printf "username=%%s\\npassword=%%s\\n" "$%s" "$%s" #' % mine,
        mine[0]: urllib.parse.unquote(name), mine[1]: urllib.parse.unquote(word), "GIT_CONFIG_COUNT": str(number + 1)}


def assigned(env: dict[str, str]) -> str:
    return " ".join("%s=%s" % (name, shlex.quote(value)) for name, value in env.items())


# An image may have pip, or only uv.
INSTALL = ("airlift_pip() { if ! command -v uv >/dev/null || python3 -m pip --version >/dev/null 2>&1; then "
           "python3 -m pip install --quiet \"$@\"; "
           "else uv pip install --quiet --python \"$(command -v python3)\" \"$@\"; fi; }")


def install_commands(job: dict) -> list[str]:
    """What installs packages, if any: first from wheels alone. What may hold a password comes through a pipe, as a
    requirements file."""
    folders = [('"$AIRLIFT_CODE"/' if not folder.startswith("/") else "") + shlex.quote(folder)
               for folder in job.get("links", [])]
    links = ["--find-links " + folder for folder in folders]
    words: list[str] = []
    lines: list[str] = []
    env: dict[str, str] = {}
    for extra in job.get("pip", []):
        if hide(extra) == extra:
            words.append(extra)
            continue
        option = words.pop() + " " if words and words[-1] in ("-i", "--index-url", "--extra-index-url", "-f",
                                                              "--find-links") else ""
        clean, login = without_login(extra, len(env) // 4) if "git+" in extra else (extra, {})
        env.update(login)
        lines.append(option + clean)
    pipe = ["-r <(printf '%%s\\n' %s)" % " ".join(map(shlex.quote, lines))] * bool(lines)
    install = ["airlift_pip --no-index", *links, *map(shlex.quote, job.get("install", []))]
    pip = [*filter(None, [assigned(env)]), "airlift_pip", *links, *map(shlex.quote, words), *pipe]
    found = [" ".join(install)] * bool(job.get("install")) + [" ".join(pip)] * bool(job.get("pip"))
    return ["%s; %s" % (INSTALL, each) for each in found]


HEED = """trap : HUP USR1 USR2; trap AIRLIFT_TERM=143 TERM; trap AIRLIFT_TERM=130 INT
trap '[ -z "${AIRLIFT_TERM:-}" ] || exit $AIRLIFT_TERM' DEBUG"""


def script_for(job: dict, workdir: str, ready: int) -> str:
    """The one bash script: startup commands, then the recipe. Between them a byte goes to the descriptor `ready`, which
    tells whose exit code it is. When TERM arrives, a bash with a trap waits for the command that runs and goes on from
    there: to its end, with the recipe's own code, if that was the last one; else it exits, or a TERM between two
    commands would be lost."""
    lines = ["trap 'exit 143' TERM; trap 'exit 130' INT; trap : HUP USR1 USR2",
             "cd -- %s || exit %d" % (shlex.quote(workdir), TOOL)]
    for clone in job.get("clones", []):
        url, login = without_login(clone["url"])
        words = dict(clone, url=url, shown=hide(clone["url"]))
        lines.append(CLONE_SCRIPT.format(code=CLONE, env="export GIT_TERMINAL_PROMPT=0 " + assigned(login),
                                         **{name: shlex.quote(value) for name, value in words.items()}))
    for number, command in enumerate(install_commands(job) + job["setup"], 1):
        lines.append("eval %s || { echo 'airlift: startup command %d failed with exit code '$? >&2; exit %d; }"
                     % (shlex.quote(command), number, SETUP))
    if job.get("tool"):
        tool = shlex.quote(job["tool"])
        lines.append("command -v %s >/dev/null || { echo 'airlift: there is no '%s' in this image' >&2; exit %d; }"
                     % (tool, tool, TOOL))
    return "\n".join([*lines, HEED, "echo >&%d; exec %d>&-" % (ready, ready), job["command"], ""])


class Child:
    """The bash that runs the recipe, in a process group of its own, and the signals for it."""

    ENDING = (signal.SIGTERM, signal.SIGINT)
    PASSED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # what they mean, if anything, the recipe knows
    SIGNALS = ENDING + PASSED

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.signal = 0  # the last one of ENDING that came
        for number in self.ENDING:
            signal.signal(number, self.forward)
        for number in self.PASSED:
            signal.signal(number, self.pass_on)
        signal.signal(signal.SIGALRM, self.remind)
        signal.signal(signal.SIGURG, lambda _, frame: self.forward(signal.SIGTERM, frame))  # of Slurm's time limit

    def pass_on(self, number: int, _frame: object) -> None:
        """Give a signal to the recipe. Before there is one, nobody is there to heed it."""
        if self.process:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, number)

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
        """Have bash run the file `script` to its end; its output goes through us, also to the file `log`, so that
        nothing of it can follow our last line. Returns its code, 128+N if signal N ended it."""
        become_subreaper()
        # A signal that came while bash is being started would find nobody to go to: it waits until there is.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            self.process = subprocess.Popen(
                ["bash", script], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=(ready,),
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS))
        except FileNotFoundError:
            raise Failure(TOOL, "there is no bash in this image") from None
        except OSError as error:
            raise Failure(TOOL, "bash cannot be started: %s" % error.strerror) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
            os.close(ready)
        assert self.process.stdout
        out = os.dup(1)
        pump = threading.Thread(target=copy_output, args=(self.process.stdout, log, out), daemon=True)
        try:
            pump.start()
            return reap(self.process.pid)
        finally:
            end_the_rest()
            pump.join(5)
            if pump.is_alive():
                say("what the recipe has started is still there and holds its output, which ends here")
            os.dup2(os.open(os.devnull, os.O_WRONLY), out)


class Redrawn:
    """What a recipe prints, made into lines that end: of one that is drawn again and again with carriage returns (a
    progress bar), what it shows every REDRAW_S seconds, as a line of its own, and its last state. Everything else
    passes as it comes. Line by line is how platforms keep logs, and a bar would fill one."""

    REDRAW_S = 10.0
    PIECES = re.compile(rb"([^\r\n]*)(\r?\n|\r|$)")

    def __init__(self) -> None:
        self.state = b""  # of the line that is being drawn: what it shows
        self.text = b""  # and what has come since its last carriage return
        self.redrawn = self.open = False  # it has had one; a part of it is out, without an end
        self.shown = -self.REDRAW_S

    def pass_on(self, data: bytes) -> bytes:
        """What goes out for what has come; for b"", the end, what is still held."""
        if not self.redrawn and b"\r" not in data:
            self.open = data[-1:] not in (b"", b"\n") or (self.open and not data)
            return data
        out = [self._piece(*match.groups()) for match in self.PIECES.finditer(data)]
        late = time.monotonic() - self.shown >= self.REDRAW_S
        held = self.state if data else self.text or self.state  # at the end, also what was not drawn over any more
        if self.redrawn and held and (late or not data):
            out.append(held + b"\n")
            self.state, self.shown = b"", time.monotonic()
        return b"".join(out)

    def _piece(self, text: bytes, end: bytes) -> bytes:
        if end == b"\r" and self.open:  # its beginning is out already
            self.open, self.redrawn = False, True
            return text + b"\n"
        if end == b"\r":
            self.state, self.text, self.redrawn = self.text + text or self.state, b"", True
            return b""
        if self.redrawn:
            self.text += text
            if not end:
                return b""
            last, self.state, self.text, self.redrawn = self.text or self.state, b"", b"", False
            return last and last + b"\n"
        self.open = bool(text or self.open) and not end
        return text + end


def copy_output(pipe: IO[bytes], log: str | None, out: int = 1) -> None:
    """Pass on what comes, see Redrawn. A log that cannot be written (full disk) is said once, and the recipe goes on;
    so it does when nobody reads our output any more: the pipe must be emptied, or the recipe would stand still."""
    try:
        file = open(os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "ab", buffering=0
                    ) if log else None
    except OSError as error:
        say("the log %s cannot be kept: %s" % (log, error.strerror))
        file = None
    redrawn, came = Redrawn(), b"-"
    while came:
        came = os.read(pipe.fileno(), 65536)
        data = redrawn.pass_on(came)
        try:
            if file:
                file.write(data)
        except OSError as error:
            say("the log %s ends here: %s" % (log, error.strerror))
            file = None
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(out, data):]


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
    say("cannot be ended: " + ", ".join("%s (%d)" % (name, pid) for pid, name in children_of(os.getpid()).items()))


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
