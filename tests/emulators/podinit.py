"""Run one pod: the program that stands between the emulator and a job's process.

The emulator starts `python -I -S podinit.py` once for each container start and talks to it over its standard streams:

    in    one line of JSON (the container), then commands: `signal N`, `term SECONDS`
    out   one line of JSON for each thing that happens: started (pid), refused (no exec), exited (code)

This process stays outside, as the container runtime's shim does. Its child becomes process 1 of a new PID namespace,
with its own mounts, hostname, IPC and the job's network namespace, and a root that is an overlay of this machine's `/`
on a tmpfs. What the image "does not have" is taken away from inside that root, never from outside, so that nothing
here can remove a file of this machine. The last step is one real execve: the kernel's own limits on argv and
environment apply, and since the container's description comes over a pipe, to that execve only.

Nothing survives the emulator: the end of standard input kills the child, the child dies with this process
(PR_SET_PDEATHSIG), and with process 1 goes its PID namespace and with that every mount. Standard library only.

Not by bubblewrap: with `/` bound onto `/` it makes the folders that are mounted on, like /nemo_run, on the host.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
BIN_DIRS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
OLD = "/.pivot"  # where this machine's root hangs while the pod's is being put together

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    """Raise the error of a C call that failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    args = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    checked(libc.mount(*args, flags, None if data is None else os.fsencode(data)), f"mount {target}")


def make_root(spec: dict[str, Any]) -> None:
    """Replace this process's root by the pod's: overlay, proc, dev, shm, volumes, /etc/hosts, minus what is hidden."""
    base = spec["base"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", base, "tmpfs", 0, spec["disk"])  # the upper half of an overlay cannot lie on an overlay itself
    os.chdir(base)
    for name in ("upper", "work", "root"):
        os.mkdir(name)
    mount("overlay", "root", "overlay", 0, "lowerdir=/,upperdir=upper,workdir=work")
    for number, bind in enumerate(spec["binds"]):
        os.mkdir(f"volume{number}")
        mount(bind["source"], f"volume{number}", None, MS_BIND | MS_REC)
    os.mkdir("root" + OLD)
    checked(libc.pivot_root(b"root", os.fsencode("root" + OLD)), "pivot_root")
    os.chdir("/")
    # From here on every path is looked up inside the pod: a link in it cannot lead back to this machine.
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in ("/dev", "/sys"):
        mount(OLD + name, name, None, MS_BIND | MS_REC)
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['shm_bytes']}")
    hide(spec)
    for number, bind in enumerate(spec["binds"]):
        os.makedirs(bind["target"], exist_ok=True)
        mount(f"{OLD}{base}/volume{number}", bind["target"], None, MS_BIND | MS_REC)
        if bind["read_only"]:
            mount("none", bind["target"], None, MS_BIND | MS_REMOUNT | MS_RDONLY)
    write("/etc/hosts", "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in spec["hosts"]))
    write("/etc/hostname", spec["hostname"] + "\n")
    checked(libc.umount2(os.fsencode(OLD), MNT_DETACH), "umount the old root")
    os.rmdir(OLD)


def write(path: str, text: str) -> None:
    """Write a file of the pod's own, also where the image has a link."""
    if os.path.lexists(path):
        os.unlink(path)
    with open(path, "w") as file:
        file.write(text)


def hide(spec: dict[str, Any]) -> None:
    """Take away what the image does not have: names of tools, files, and whole folders (except what `keep` lists)."""
    kept: list[tuple[str, str]] = []
    for path in spec["keep"]:
        if any(inside(path, cover) for cover in spec["covers"]):
            stash = f"{OLD}{spec['base']}/keep{len(kept)}"
            os.mkdir(stash)
            mount(path, stash, None, MS_BIND)  # of the overlay: what the pod writes there stays in the pod
            kept.append((stash, path))
    for cover in spec["covers"]:
        if os.path.isdir(cover):
            mount("tmpfs", cover, "tmpfs", 0, "mode=1777" if cover == "/tmp" else "mode=755")
    for stash, path in kept:
        os.makedirs(path, exist_ok=True)
        mount(stash, path, None, MS_BIND)
    folders = dict.fromkeys([*spec["env"].get("PATH", "").split(":"), *BIN_DIRS])
    for name in spec["hide"]:
        for path in [name] if "/" in name else [f"{folder}/{name}" for folder in folders if folder]:
            if os.path.isdir(path):
                mount("tmpfs", path, "tmpfs", 0, "mode=755")
            elif os.path.lexists(path):
                os.unlink(path)


def inside(path: str, folder: str) -> bool:
    """Is `path` this folder or something in it?"""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def execute(argv: list[str], env: dict[str, str]) -> NoReturn:
    """execve, looking the program up in the pod's own PATH; raises the most telling of the errors."""
    program = argv[0]
    paths = [program] if "/" in program else [f"{d}/{program}" for d in env.get("PATH", "").split(":") if d]
    failure = OSError(errno.ENOENT, f'"{program}": executable file not found in $PATH')
    for path in paths:
        try:
            os.execve(path, argv, env)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR) or path == program:
                failure = OSError(error.errno, f'"{program}": {os.strerror(error.errno or 0).lower()}')
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                break
    raise failure


def become_pod(spec: dict[str, Any], log: int, report: int) -> NoReturn:
    """In the child, process 1 of the pod: build its world, then execve; on failure say where it stopped."""
    stage = "CreateContainerError"
    try:
        checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        os.setsid()
        if spec["network"] is not None:
            checked(libc.setns(spec["network"], CLONE_NEWNET), "setns")
            os.close(spec["network"])
        checked(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC), "unshare")
        socket.sethostname(spec["hostname"])
        make_root(spec)
        stage = "StartError"
        os.chdir(spec["workdir"])
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.umask(0o022)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and what is ignored stays so
            signal.signal(number, signal.SIG_DFL)
        execute(spec["argv"], spec["env"])
    except BaseException as error:  # whatever it was: the parent must hear of it, and this process must not go on
        text = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
        code = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
        os.write(report, json.dumps({"reason": stage, "errno": code, "message": text}).encode())
    finally:
        os._exit(128)


def tell(**event: Any) -> None:
    """One line to the emulator, which may have gone."""
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except BrokenPipeError:
        pass


def read_line(fd: int) -> tuple[bytes, bytes]:
    """The first line from a pipe, and what came with it."""
    data = b""
    while b"\n" not in data:
        block = os.read(fd, 1 << 20)
        if not block:
            sys.exit("podinit: no container given")
        data += block
    line, _, rest = data.partition(b"\n")
    return line, rest


def supervise(pid: int, rest: bytes) -> int:
    """Pass commands on until the pod has ended; returns its wait status."""
    watch = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    poll.register(0, select.POLLIN | select.POLLHUP)
    deadline: float | None = None
    while True:
        *lines, rest = rest.split(b"\n")
        for line in lines:
            word, value = line.split()
            if word == b"term":
                deadline = time.monotonic() + float(value)
            os.kill(pid, signal.SIGTERM if word == b"term" else int(value))
        left = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))
        ready = dict(poll.poll(left))
        if watch in ready:
            return os.waitpid(pid, 0)[1]
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        if 0 in ready:
            block = os.read(0, 65536)
            if not block:  # the emulator has gone
                os.kill(pid, signal.SIGKILL)
                return os.waitpid(pid, 0)[1]
            rest += block


def main() -> None:
    """Read the container, start it, stay until it ends."""
    line, rest = read_line(0)
    spec = json.loads(line)
    log = os.open(spec["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    hear, report = os.pipe()
    checked(libc.unshare(CLONE_NEWPID), "unshare")
    pid = os.fork()
    if pid == 0:
        become_pod(spec, log, report)
    os.close(report)
    refusal = b"".join(iter(lambda: os.read(hear, 65536), b""))  # ends when the execve has closed the other end
    if refusal:
        os.waitpid(pid, 0)
        tell(event="refused", **json.loads(refusal))
        return
    tell(event="started", pid=pid)
    status = os.waitstatus_to_exitcode(supervise(pid, rest))
    tell(event="exited", code=status if status >= 0 else 128 - status, signal=max(0, -status))


if __name__ == "__main__":
    main()
