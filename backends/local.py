"""Pods as processes on this machine, started the way a platform would start them.

A supervisor process (forked, so that a detached job outlives the launcher) starts one process per pod with the plan's
argv and environment, NODE_RANK, the address of rank 0, and a scratch folder of its own. It prefixes each pod's output
with its rank, ends the others when one fails, and writes the exit code of the first failure. When the launcher of an
attached job dies, the supervisor gets SIGTERM; when the supervisor dies, each pod does.
"""

import contextlib
import ctypes
import itertools
import json
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
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypedDict

import archive
import screen
import state
import transport
from backends import ENDED_ALREADY, Finding, Status, exit_status
from backends.common.ends import Ends
from backends.common.outputs import copied
from jobs import Job, setup_commands, workspace
from pod.failures import Failure, say
from pod.payload import join
from pod.places import own_place
from pod.process import become_subreaper, end_the_rest
from runs import Run
from transport import Plan, Refusal

CAN = {"detach", "ray"}
GRACE_S = 10.0  # between TERM and KILL
TAIL = 1 << 20  # bytes of a log in which the end of each rank is looked for


class Record(TypedDict):
    """What is kept of pods on this machine."""

    folder: str  # in Airlift's home: `log` and, at the end, `exit`
    pid: int  # of the supervisor
    born: str  # when it was started, in the kernel's ticks


def check(job: Job, plan: Plan) -> None:
    """Raises Refusal for fewer GPUs than the pods need, where CUDA_VISIBLE_DEVICES says which may be used."""
    gpus, mine = job.gpus_per_node, visible()
    if mine is not None and isinstance(gpus, int) and gpus * job.nodes > len(mine):
        raise Refusal("the job needs %d GPUs, and CUDA_VISIBLE_DEVICES=%s names %d" % (
            gpus * job.nodes, os.environ["CUDA_VISIBLE_DEVICES"], len(mine)), "set gpus_per_node, or name more of them")


def visible() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES gives us here: numbers or names, to the first that is none; None: all."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return None
    names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    return list(itertools.takewhile(re.compile(r"[0-9]+$|GPU-|MIG-").match, names))


def submit(run: Run, job: Job, plan: Plan, attached: bool) -> None:
    """Start the supervisor."""
    folder = state.folder("local", job.run_id)
    (folder / "log").touch(0o600)
    with socket.socket() as probe:  # a free port for rank 0
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
    run.running_since = run.running_since or time.time()
    run.keep(Record(folder=str(folder), pid=pid, born=_born(pid)))


def follow(run: Run) -> Status:
    """Print the log until the pods have ended. On a terminal, the last line shows what they write to PROGRESS_FILE."""
    rest, shown = b"", ""
    with open(Path(run.record["folder"], "log"), "rb") as log:
        try:
            while True:
                over = not _alive(run)
                data = log.read()
                if data:
                    shown = screen.progress("", shown)
                rest = _show(run, rest + data)
                if not data and over:
                    break
                if not data:
                    shown = screen.progress(_progress(run), shown)
                    time.sleep(0.05)
        finally:
            screen.progress("", shown)
        ended = status(run)
        return replace(ended, why=_ends(log).said()) if ended.state == "failed" else ended


def _ends(log: IO[bytes]) -> Ends:
    """How the ranks ended, by the last TAIL bytes of the log, which has been read."""
    log.seek(max(0, log.tell() - TAIL))
    ends = Ends()
    for found in re.finditer(rb"(?m)^\[(\d+)\] (.*)", log.read()):
        ends.note(int(found.group(1)), found.group(2).decode("utf-8", "replace"))
    return ends


def _progress(run: Run) -> str:
    """The newest progress line of a pod; "" if there is none."""
    files = Path(run.record["folder"]).glob("progress-*[0-9]")
    try:
        return max(files, key=lambda file: file.stat().st_mtime_ns).read_text(encoding="utf-8", errors="replace")
    except (ValueError, FileNotFoundError):
        return ""


def logs(run: Run) -> None:
    _show(run, Path(run.record["folder"], "log").read_bytes())


def _show(run: Run, data: bytes) -> bytes:
    """Print the complete lines of run.ranks and of the supervisor; returns the last, incomplete line."""
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
    if _alive(run):  # whatever the file says, which a pod could have written; the supervisor writes it at its end
        return Status("running")
    return exit_status(Path(run.record["folder"])) or Status("failed", "its supervisor was killed")


def cancel(run: Run) -> str:
    """Send TERM to the supervisor, which ends its pods; returns when they are gone."""
    if not _alive(run):
        return ENDED_ALREADY % status(run).state
    (Path(run.record["folder"]) / "cancelled").touch(0o600)
    os.kill(run.record["pid"], signal.SIGTERM)
    while _alive(run):
        time.sleep(0.05)
    return "ended, with all its pods" if run.nodes > 1 else "ended, with its pod"


def jobs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in sorted(_running()):
        yield name, "running"


def adopt(settings: dict[str, Any], name: str) -> archive.Found:
    """From the environment of pods that run: nothing else on this machine has what was sent."""
    running = _running()
    if name not in running:
        raise Refusal("no pods of run %s run on this machine" % name,
                      "a run that has ended here is only in Airlift's home, where it was launched", 4)
    pid, env = running[name]
    parent = int(Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[1])
    folder = state.folder("local", name)
    (folder / "log").touch(0o600)
    return archive.from_env(env, Record(folder=str(folder), pid=parent, born=_born(parent)), time.time())


def bring(run: Run, pattern: str, folder: Path) -> list[str]:
    return copied(Path(str(run.outputs)), pattern, folder)


def _running() -> dict[str, tuple[int, dict[str, str]]]:
    """run -> (pid, environment) of its first pod, of all pods of this user that run here."""
    found: dict[str, tuple[int, dict[str, str]]] = {}
    for path in sorted(Path("/proc").glob("[0-9]*/environ"), key=lambda path: int(path.parts[2])):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        env = dict(os.fsdecode(word).partition("=")[::2] for word in words)
        if "AIRLIFT_TREE_CHUNKS" in env:
            with contextlib.suppress(Failure, ValueError, zlib.error):
                sent = json.loads(zlib.decompress(join(env, "JOB")))
                found.setdefault(str(sent["run"]), (int(path.parts[2]), env))
    return found


def probe(settings: dict[str, Any], job: Job | None) -> Iterator[Finding]:
    """What a pod needs here: programs, space, GPUs."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", os.defpath)
    tools = [job.description["tool"], *["ray"] * (job.description["launch"] == "ray")] if job else []
    brought = job and (setup_commands(job.settings) or (job.description["setup"] and shutil.which("uv", path=path)))
    for tool in dict.fromkeys(["python3", "bash", *filter(None, tools)]):
        program = shutil.which(tool, path=path)
        lacks = "warning" if tool in tools and brought else "failure"
        yield Finding(tool, "ok", program) if program else Finding(
            tool, lacks, "is not in the PATH", "install it, or run make setup", 2)
    cores, pods = len(os.sched_getaffinity(0)), job.nodes if job else 1
    yield Finding("cores", "ok" if pods <= cores else "warning" if pods <= 4 * cores else "failure",
                  "%d here, for %d pods" % (cores, pods), "use fewer: --nodes %d" % cores, 2 if pods > 4 * cores else 0)
    base = Path(workspace(settings) or tempfile.gettempdir())
    for name, place in (("scratch", Path(tempfile.gettempdir())), ("workspace", base)):
        here = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(here).free
        low = Finding(name, "warning", "%s: only %s free" % (place, transport.human(free)), "free some space")
        fine = Finding(name, "ok", "%s: %s free" % (place, transport.human(free)))
        yield (low if free < 1 << 30 else fine) if os.access(here, os.W_OK) else Finding(
            name, "failure", "%s cannot be written" % place, "choose another folder", 2)
    gpus = (job.gpus_per_node if job else settings.get("gpus_per_node")) or 0
    mine = visible()
    found = len(list(Path("/dev").glob("nvidia[0-9]*"))) if mine is None else len(mine)
    wanted = gpus * (job.nodes if job else settings.get("nodes", 1)) if isinstance(gpus, int) else 1
    if wanted:
        yield Finding("GPUs", "ok", "%d here" % found) if found >= wanted else Finding(
            "GPUs", "failure", "the job needs %d, and %d are here" % (wanted, found), "set gpus_per_node = 0", 2)


def supervise(folder: Path, argv: list[str], envs: list[dict[str, str]]) -> int:
    """Run one process per environment until all have ended; the first failure ends the others and sets the code."""
    scratch = None
    pods: list[subprocess.Popen[bytes]] = []
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(128 + number))
    code = 70
    become_subreaper()  # the children of a killed pod become ours, as those of a container become process 1's
    try:
        with open(folder / "log", "ab", buffering=0) as log:
            scratch = Path(own_place("local", dict(os.environ)))
            for rank, env in enumerate(envs):
                place = scratch / ("rank-%d" % rank)
                place.mkdir(mode=0o700)
                pods.append(subprocess.Popen(
                    argv, env=env | {"TMPDIR": str(place)}, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, preexec_fn=die_with_parent))
            copiers = [threading.Thread(target=_prefix, args=(pod.stdout, log, b"[%d] " % rank * (len(envs) > 1)))
                       for rank, pod in enumerate(pods)]
            for copier in copiers:
                copier.start()
            code = _watch(pods, stop)
            end_the_rest(1.0)
            for copier in copiers:
                copier.join(5)
    except (OSError, Failure) as error:
        say("the pods cannot be started: %s" % (getattr(error, "seen", "") or error))
    finally:
        for pod in pods:
            if pod.poll() is None:
                pod.kill()
        end_the_rest(1.0)
        shutil.rmtree(scratch or "", ignore_errors=True)
        for file in folder.glob("progress-*"):
            file.unlink()
        state.write(folder / "exit", b"%d\n" % code)
    return 0


def _watch(pods: list[subprocess.Popen[bytes]], stop: list[int]) -> int:
    code, deadline = 0, 0.0
    while None in [pod.poll() for pod in pods]:  # a list, so that all are polled
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
    """Copy line by line; an incomplete line is copied when its pod ends."""
    for line in pipe:
        log.write(prefix + line if line.endswith(b"\n") else prefix + line + b"\n")


def pod_env(job: Job, plan: Plan, rank: int, port: int, folder: Path) -> dict[str, str]:
    """A pod's whole environment: a small base, the rank and address of the pods, the plan."""
    here = str(Path(sys.executable).parent)
    base = {"PATH": here + os.pathsep + os.environ.get("PATH", os.defpath), "HOME": str(Path.home()),
            **{name: os.environ[name] for name in ("USER", "LOGNAME") if name in os.environ},
            "LANG": os.environ.get("LANG", "C.UTF-8"), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
            "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PROGRESS_FILE": str(folder / ("progress-%d" % rank))}
    gpus = job.gpus_per_node
    mine = visible()
    if isinstance(gpus, int):  # each pod gets its own GPUs; with "gpu", every pod gets all
        mine = [str(index) for index in range(gpus * job.nodes)] if mine is None else mine
        mine = mine[rank * gpus:(rank + 1) * gpus]
    if mine is not None:
        base["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return base | plan.env


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def _detach(folder: Path, launcher: int, attached: bool) -> None:
    """Start a new session, so that Ctrl-C reaches only the launcher. The supervisor's own output goes to the log."""
    os.setsid()
    if attached:
        die_with_parent()
        if os.getppid() != launcher:
            os._exit(70)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _born(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it is gone. Pids are used again, pairs of both not."""
    try:
        fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # a zombie counts as gone: a container may never reap it


def _alive(run: Run) -> bool:
    """Whether the supervisor still runs. If it is our child and has ended, it is reaped first."""
    pid = run.record["pid"]
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return _born(pid) == run.record["born"] != ""
