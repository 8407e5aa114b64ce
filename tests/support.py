"""What the tests of transport.py and pod/ share: trees on disk and in memory, a job, pods that are real processes.

A pod here is one execve of a plan's argv with a plan's environment, PATH and TMPDIR, and nothing else, so that the
kernel's limits hold as they would on a platform.
"""

import contextlib
import functools
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import transport
from pod import failures
from transport import Entry, Plan, Tree

SCRIPT = "src/pkg/recipes/fam/train.py"
PATH = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"])


def need(ability: object, why: str) -> None:
    """Skip a test for what this machine cannot do; in CI that is a failure (conftest.py)."""
    if not ability:
        pytest.skip(why)


@functools.cache
def pythons() -> dict[tuple[int, int], str]:
    """The Pythons of this machine that start by themselves, whatever HOME says (a shim of pyenv may not), by version."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    paths = [sys.executable, "/usr/bin/python3", *map(str, sorted(home.glob(".pyenv/versions/*/bin/python")))]
    paths += filter(None, (shutil.which("python%d.%d" % version) for version in [(2, 7), *((3, n) for n in range(20))]))
    found: dict[tuple[int, int], str] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            done = subprocess.run([path, "-c", "import sys; print('%d %d' % sys.version_info[:2])"],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={"PATH": os.defpath})
            if done.returncode == 0:
                major, minor = done.stdout.split()
                found.setdefault((int(major), int(minor)), path)
    return dict(sorted(found.items()))


def python(major: int, minor: int) -> str:
    need((major, minor) in pythons(), "there is no Python %d.%d here" % (major, minor))
    return pythons()[major, minor]


def toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{%s}" % ", ".join("%s = %s" % (json.dumps(k), toml(v)) for k, v in value.items())
    if isinstance(value, list):
        return "[%s]" % ", ".join(map(toml, value))
    return repr(value) if isinstance(value, float) else json.dumps(value)


@contextlib.contextmanager
def as_a_recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as a pod's: one thread, nothing set by torchrun or for someone else's cluster, and pytest's own
    signal handlers afterwards."""
    import torch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NEMO_RUN_DIR", "MODEL_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


SECRET = "5ec2e7" * 10 + "abcd"


def job(**changes: Any) -> dict[str, Any]:
    """A job's description as launch.py makes it."""
    changes = {"secret": SECRET} | changes if changes.get("cluster") == "pods" else changes
    return {"run": "t23456", "recipe": "fam/train", "script": SCRIPT, "launch": "direct", "nodes": 1, "run_root": None,
            "config": "answer: 42\n", "env": {}, "setup": [], "command": "true", "tool": "", "workdir": None} | changes


def tree(files: dict[str, bytes] | None = None) -> Tree:
    """A tree in memory: the recipe's script, and what is named besides."""
    return Tree(tuple(Entry(path, data) for path, data in sorted(({SCRIPT: b"pass\n"} | (files or {})).items())))


def plant(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below `root`; a text that begins with `-> ` is a link's target."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, str) and data.startswith("-> "):
            path.symlink_to(data[3:])
        else:
            path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def shape(folder: str | Path) -> dict[str, tuple[str, bytes, bool]]:
    """What lies below a folder: path -> (kind, bytes or target, executable)."""
    found = {}
    for place, folders, files in os.walk(os.fsencode(folder)):
        for name in files + [name for name in folders if os.path.islink(os.path.join(place, name))]:
            path = os.path.join(place, name)
            key = os.path.relpath(path, os.fsencode(folder)).decode()
            if os.path.islink(path):
                found[key] = ("link", os.readlink(path), False)
            else:
                with open(path, "rb") as file:
                    found[key] = ("file", file.read(), bool(os.stat(path).st_mode & 0o100))
    return found


def shape_of(tree: Tree) -> dict[str, tuple[str, bytes, bool]]:
    return {entry.path: ("link" if entry.link else "file", entry.data, entry.executable) for entry in tree.entries}


# ---------------------------------------------------------------- pods


def base(scratch: Path, digest: str) -> Path:
    """A pod's own folder for a tree, below its TMPDIR."""
    return scratch / ("airlift-%d" % os.geteuid()) / digest[:16]


@dataclass
class Pod:
    """A started pod. Every process that descends from it carries `mark` in its environment."""

    process: "subprocess.Popen[bytes]"
    mark: str
    scratch: Path
    digest: str
    output: bytes = field(default=b"")

    def until(self, word: bytes, seconds: float = 20.0) -> None:
        """Read its output until `word` has come."""
        deadline = time.monotonic() + seconds
        assert self.process.stdout
        while word not in self.output:
            data = os.read(self.process.stdout.fileno(), 65536)
            self.output += data
            assert data and time.monotonic() < deadline, self.output

    def end(self, seconds: float = 30.0) -> int:
        """Wait for its end; the exit code as a shell gives it."""
        rest, _ = self.process.communicate(timeout=seconds)
        self.output += rest or b""
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> int:
        os.kill(self.process.pid, number)
        return self.end()

    @property
    def text(self) -> str:
        return self.output.decode("utf-8", "replace")

    @property
    def places(self) -> list[Path]:
        return sorted(self.scratch.glob("airlift-*/*"))

    @property
    def code(self) -> Path:
        return base(self.scratch, self.digest) / "code"

    def alive(self) -> list[int]:
        """Processes that still run and carry the mark."""
        return [pid for pid in marked(self.mark) if pid != self.process.pid]


MARKS: list[str] = []  # of all pods that were started in this process


def marked(mark: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in Path("/proc", entry, "environ").read_bytes():
                    found.append(int(entry))
    return found


@contextlib.contextmanager
def started(plan: Plan, scratch: Path, *, env: dict[str, str | None] | None = None, argv: list[str] | None = None,
            **options: Any) -> Iterator[Pod]:
    """A pod as a real process. `env` is added to the plan's, None takes a name out. In the end nothing is left."""
    mark = uuid.uuid4().hex
    MARKS.append(mark)
    whole = plan.env | {"PATH": PATH, "TMPDIR": str(scratch), "TEST_MARK": mark} | (env or {})
    scratch.mkdir(parents=True, exist_ok=True)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {name: value for name, value in whole.items() if value is not None}
    process = subprocess.Popen(argv or plan.argv, env=environment, **(streams | {"cwd": "/"} | options))
    pod = Pod(process, mark, scratch, plan.digest)
    try:
        yield pod
    finally:
        for pid in {process.pid, *pod.alive()} if process.poll() is None else pod.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def ran(plan: Plan, scratch: Path, **options: Any) -> tuple[int, Pod]:
    """Run a pod to its end: (exit code, pod)."""
    with started(plan, scratch, **options) as pod:
        return pod.end(), pod


ENDED = "airlift: rank %s ended with exit code %d\n"


def failed(code: int, out: Pod, rank: str = "0") -> str:
    """Check what every failure of a pod's own must say, and give the sentence that tells what was seen."""
    assert "Traceback" not in out.text, out.text
    assert "RECIPE RAN" not in out.text, out.text
    lines = out.text.splitlines()
    if code == failures.POD and "what to do" not in out.text:  # the bootstrap's own words
        assert lines == ["airlift: the program that unpacks did not arrive whole",
                         "airlift: rank unknown ended with exit code 80"]
        return lines[0]
    what, fix = failures.FAILURES[code]
    assert out.text.endswith(ENDED % (rank, code)), out.text
    assert lines[-2] == "airlift: what to do: " + fix
    start = "airlift: rank %s: %s: " % (rank, what)
    assert lines[-3].startswith(start), out.text
    return lines[-3][len(start):]


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def plan(files: dict[str, bytes] | None = None, executor: str = "local", chunk_bytes: int = 0,
         visible: dict[str, str] | None = None, **changes: Any) -> Plan:
    """A plan of a small tree and of a job with the given changes; `visible` is what the platform sees besides."""
    return transport.plan_for(executor, tree(files), job(**changes), chunk_bytes=chunk_bytes, env=visible)


@contextlib.contextmanager
def tmpfs(place: Path, options: str) -> Iterator[Path]:
    """A small file system of its own at `place`. Mounting needs root."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
    need(mounted.returncode == 0, "cannot mount a tmpfs here: %s" % mounted.stderr.decode())
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


NOBODY = 65534  # another user


def as_nobody(work: Callable[[], object]) -> str:
    """What another user gets to see when they try that: "" where it works."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.umask(0)
            work()
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as said:
        return said.read()
