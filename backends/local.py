"""Pods as processes of this machine, started the way a platform would start them.

A supervisor process (forked, so that a detached job outlives the launcher) starts one process per pod with the plan's
argv and environment, NODE_RANK, an address and a port for rank 0, and a scratch folder of its own. It prefixes each
pod's output with its rank, ends the others when one fails, and writes the first failure's code. Attached, the
supervisor gets SIGTERM when the launcher dies; each pod gets it when the supervisor dies.
"""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypedDict

import screen
import transport
from backends import Finding, Status, ended_already
from jobs import Job, workspace
from pod.process import become_subreaper, end_the_rest
from runs import Run, home
from transport import Plan, Refusal

CAN = {"detach", "ray"}
GRACE_S = 10.0  # between TERM and KILL


class Record(TypedDict):
    """What is remembered of pods on this machine."""

    folder: str  # `log` and, at the end, `exit`
    pid: int  # of the supervisor
    born: str  # when that was started, in the kernel's ticks


# ---------------------------------------------------------------- what launch.py calls


def check(job: Job, plan: Plan) -> None:
    """Pods here are processes: nobody refuses them."""


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Start the supervisor. Its folder under Airlift's home holds `log` and, at the end, `exit`."""
    folder = home() / "local" / job.run_id
    folder.mkdir(mode=0o700, parents=True)
    port = _free_port()
    envs = [pod_env(job, plan, rank, port, folder) for rank in range(job.nodes)]
    launcher = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _detach(folder, launcher, attached)
            os._exit(supervise(folder, plan.argv, envs))
        except BaseException:
            traceback.print_exc()  # into the log
        finally:
            os._exit(70)
    run.seen_running()
    run.keep(Record(folder=str(folder), pid=pid, born=_born(pid)))


def follow(run: Run) -> Status:
    """Pass the log on until the supervisor has written the exit code. On a terminal a last line moves with what the
    recipe writes to PROGRESS_FILE; it is in no log."""
    rest, moving = b"", ""
    with open(_await(Path(run.record["folder"]) / "log"), "rb") as log:
        try:
            while True:
                over = not _alive(run)
                data = log.read()
                if data:
                    moving = screen.moving("", moving)
                rest = _show(run, rest + data)
                if not data and over:
                    break
                if not data:
                    moving = screen.moving(_progress(run), moving)
                    time.sleep(0.05)
        finally:
            screen.moving("", moving)
    return status(run)


def _progress(run: Run) -> str:
    """The newest line that a pod has written of its progress; "" if there is none."""
    files = Path(run.record["folder"]).glob("progress-*[0-9]")
    try:
        return max(files, key=lambda file: file.stat().st_mtime_ns).read_text(encoding="utf-8", errors="replace")
    except (ValueError, FileNotFoundError):
        return ""


def logs(run: Run) -> None:
    _show(run, _await(Path(run.record["folder"]) / "log").read_bytes())


def _show(run: Run, data: bytes) -> bytes:
    """Print the whole lines of the ranks that are wanted, and what the supervisor says; gives the last, unfinished
    line."""
    *whole, rest = data.split(b"\n")
    for line in whole:
        found = re.match(rb"\[(\d+)\] ", line) if run.nodes > 1 else None
        if found and int(found.group(1)) not in run.ranks:
            continue
        text = line[found.end():] if found else line
        if found and len(run.ranks) > 1:
            text = screen.rank(found.group(1).decode()).encode() + text
        sys.stdout.buffer.write(text + b"\n")
    sys.stdout.flush()
    return rest


def status(run: Run) -> Status:
    alive = _alive(run)  # before the file is read: what has ended by now has written it
    folder = Path(run.record["folder"])
    try:
        code = int((folder / "exit").read_text())
    except FileNotFoundError:
        return Status("running") if alive else Status("failed", "its supervisor was killed")
    state = "done" if code == 0 else "cancelled" if (folder / "cancelled").exists() else "failed"
    return Status(state, "exit code %d" % code, code)


def cancel(run: Run) -> str:
    """TERM to the supervisor, which ends its pods; returns when they are gone."""
    if not _alive(run):
        return ended_already(status(run).state)
    (Path(run.record["folder"]) / "cancelled").touch()
    os.kill(run.record["pid"], signal.SIGTERM)
    while _alive(run):
        time.sleep(0.05)
    return "ended, with all its pods" if run.nodes > 1 else "ended, with its pod"


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """What a pod needs here: programs, space, GPUs."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", os.defpath)
    for tool in ("python3", "bash", *(["torchrun"] if job and job.description["launch"] == "torchrun" else [])):
        program = shutil.which(tool, path=path)
        yield Finding(tool, "ok", program) if program else Finding(
            tool, "failure", "is not in the PATH", "install it, or run make setup", 2)
    base = Path(workspace(settings) or tempfile.gettempdir())
    for name, place in (("scratch", Path(tempfile.gettempdir())), ("workspace", base)):
        here = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(here).free
        low = Finding(name, "warning", "%s: only %s free" % (place, transport.human(free)), "make room")
        fine = Finding(name, "ok", "%s: %s free" % (place, transport.human(free)))
        yield (low if free < 1 << 30 else fine) if os.access(here, os.W_OK) else Finding(
            name, "failure", "%s cannot be written" % place, "choose another", 2)
    gpus = (job.gpus_per_node if job else settings.get("gpus_per_node")) or 0
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    wanted = gpus * (job.nodes if job else settings.get("nodes", 1)) if isinstance(gpus, int) else 1
    if wanted:
        yield Finding("GPUs", "ok", "%d here" % found) if found >= wanted else Finding(
            "GPUs", "failure", "%d are wanted, and %d here" % (wanted, found), "set gpus_per_node = 0", 2)


# ---------------------------------------------------------------- supervisor


def supervise(folder: Path, argv: list[str], envs: list[dict[str, str]]) -> int:
    """Run one process per environment to the end of all; the first failure ends the others and gives the code."""
    scratch = Path(tempfile.mkdtemp(prefix="airlift-"))
    pods: list[subprocess.Popen[bytes]] = []
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(128 + number))
    code = 70
    become_subreaper()  # what a pod leaves behind when it is killed comes to us, as to a container's process 1
    try:
        with open(folder / "log", "ab", buffering=0) as log:
            for rank, env in enumerate(envs):
                place = scratch / ("rank-%d" % rank)
                place.mkdir()
                pods.append(subprocess.Popen(
                    argv, env=env | {"TMPDIR": str(place)}, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, preexec_fn=die_with_parent))
            pumps = [threading.Thread(target=_prefix, args=(pod.stdout, log, b"[%d] " % rank if len(envs) > 1 else b""))
                     for rank, pod in enumerate(pods)]
            for pump in pumps:
                pump.start()
            code = _watch(pods, stop)
            end_the_rest(1.0)
            for pump in pumps:
                pump.join(5)
    finally:
        for pod in pods:
            if pod.poll() is None:
                pod.kill()
        end_the_rest(1.0)
        shutil.rmtree(scratch, ignore_errors=True)
        for told in folder.glob("progress-*"):
            told.unlink()
        (folder / "exit.new").write_text("%d\n" % code)
        (folder / "exit.new").rename(folder / "exit")
    return 0


def _watch(pods: list[subprocess.Popen[bytes]], stop: list[int]) -> int:
    code, deadline = 0, 0.0
    while None in [pod.poll() for pod in pods]:  # a list, so that each is asked
        failed = [pod.returncode for pod in pods if pod.returncode]
        if (failed or stop) and not deadline:
            code = stop[0] if stop else failed[0]
            deadline = time.monotonic() + GRACE_S
            for pod in pods:
                pod.terminate()
        if deadline and time.monotonic() > deadline:
            for pod in pods:
                pod.kill()
        time.sleep(0.02)
    code = code or next((pod.returncode for pod in pods if pod.returncode), 0)
    return code if code >= 0 else 128 - code


def _prefix(pipe: IO[bytes], log: Any, prefix: bytes) -> None:
    """Copy line by line; a line that is not finished is passed on when its pod ends."""
    for line in pipe:
        log.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")


def pod_env(job: Job, plan: Plan, rank: int, port: int, folder: Path) -> dict[str, str]:
    """A pod's whole environment: a small base, the platform's words, the plan. Nothing else of ours reaches it."""
    here = str(Path(sys.executable).parent)
    base = {"PATH": here + os.pathsep + os.environ.get("PATH", os.defpath), "HOME": str(Path.home()),
            "LANG": os.environ.get("LANG", "C.UTF-8"), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
            "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PROGRESS_FILE": str(folder / ("progress-%d" % rank))}
    gpus = job.gpus_per_node
    if isinstance(gpus, int):  # each pod its own GPUs; "gpu" leaves all of them to every pod
        base["CUDA_VISIBLE_DEVICES"] = ",".join(str(rank * gpus + index) for index in range(gpus))
    return base | plan.env


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def _detach(folder: Path, launcher: int, attached: bool) -> None:
    """A session of its own, so that Ctrl-C reaches only the launcher, which then says what to end. What the supervisor
    itself has to say goes to the log."""
    os.setsid()
    if attached:
        die_with_parent()
        if os.getppid() != launcher:
            os._exit(70)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(path: Path, seconds: float = 10.0) -> Path:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise Refusal("the pods did not start: %s is missing" % path, "look whether the disk is full", 5)
        time.sleep(0.02)
    return path


def _born(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it is gone. It tells a pid that was used again."""
    try:
        fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie: process 1 of a container need not reap


def _alive(run: Run) -> bool:
    """Whether the supervisor still runs. As its parent, take its end first, or it would stay as a zombie."""
    pid = run.record["pid"]
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return _born(pid) == run.record["born"] != ""
