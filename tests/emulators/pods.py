"""Pods that are real processes: what both control planes start, watch and end.

`Pod` is one container start. It has its own root, hostname and namespaces (podinit.py does that part, and says how),
the environment it is given and nothing else, a log file, and an end: an exit code as Kubernetes counts it (128+N for a
signal; 128 with the reason StartError where the execve itself failed).

`Network` is the network of one job: an empty namespace with nothing but loopback, shared by the job's pods, so that
they reach each other (by the names in /etc/hosts, each on an address of its own in 127.0.0.0/8) and nothing else: not
the emulator, not this machine, not the internet.

Who may start pods: root on Linux with overlayfs; `why_not()` says what is missing. A pod takes some 30 ms to start.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Why no pod can be started on this machine; None where one can."""
    if sys.platform != "linux":
        return "pods need Linux"
    if os.geteuid() != 0:
        return "pods need root (namespaces, overlayfs)"
    if "overlay" not in Path("/proc/filesystems").read_text() and not Path("/sys/module/overlay").exists():
        return "pods need overlayfs (modprobe overlay)"
    return None


@dataclass(frozen=True)
class Image:
    """What a container image gives: a PATH, some environment, a working directory, and things it lacks.

    The image is this machine without this repository, /tmp, /root and /home, but with the Python that runs the tests.
    `hide` takes more away: a bare name is a tool that is then nowhere on the PATH, a path is a file or a folder.
    """

    path: str = f"{sys.prefix}/bin:{SYSTEM_PATH}"
    env: Mapping[str, str] = field(default_factory=lambda: {"HOME": "/root", "LANG": "C.UTF-8"})
    hide: Sequence[str] = ()
    workdir: str = "/"
    disk_mib: int = 2048  # of its root: a pod that writes more has no space left

    def covers(self) -> list[str]:
        """Folders of this machine which no image has."""
        return [str(REPOSITORY), "/tmp", "/root", "/home"]

    def keep(self) -> list[str]:
        """Folders below those which the image has all the same: the Python it runs."""
        return sorted({sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)})


@dataclass(frozen=True)
class Bind:
    """A volume: a folder of this machine, and where the pod sees it."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class PodSpec:
    """One container, ready to start."""

    name: str
    hostname: str
    argv: Sequence[str]
    env: Mapping[str, str]
    image: Image = field(default_factory=Image)
    binds: Sequence[Bind] = ()
    hosts: Sequence[tuple[str, str]] = ()  # (name, address), for /etc/hosts
    workdir: str | None = None
    shm_mib: int = 64

    def environment(self) -> dict[str, str]:
        """The whole environment of the process: the image's, the runtime's HOSTNAME, the container's."""
        return {"PATH": self.image.path, **self.image.env, "HOSTNAME": self.hostname, **self.env}

    def document(self, base: Path, network: int | None) -> dict[str, Any]:
        """What podinit reads."""
        return {
            "base": str(base / "root"),
            "log": str(base / "log"),
            "hostname": self.hostname,
            "argv": list(self.argv),
            "env": self.environment(),
            "workdir": self.workdir or self.image.workdir,
            "disk": f"size={self.image.disk_mib}m",
            "shm_bytes": self.shm_mib * 1024 * 1024,
            "hosts": list(self.hosts),
            "hide": list(self.image.hide),
            "covers": self.image.covers(),
            "keep": self.image.keep(),
            "binds": [{"source": str(b.source), "target": b.target, "read_only": b.read_only} for b in self.binds],
            "network": network,
        }


class Pod:
    """One container start: Waiting, then Running, then Succeeded or Failed."""

    def __init__(self, spec: PodSpec, base: Path, network: Network | None, on_change: Callable[[Pod], None]) -> None:
        self.spec = spec
        self.name = spec.name
        self.base = base.resolve()
        self.log = self.base / "log"
        self.state = "Waiting"
        self.reason: str | None = None  # StartError, CreateContainerError, Error, Completed
        self.message = ""
        self.pid: int | None = None  # of process 1, as this machine counts
        self.exit_code: int | None = None
        self.ended = threading.Event()
        self._network = network
        self._on_change = on_change
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = threading.Lock()  # the container's description comes first, whoever wants to kill it meanwhile

    def start(self) -> None:
        """Start the process; what happens to it is reported through `on_change`, from a thread of its own."""
        (self.base / "root").mkdir(parents=True)
        self.log.touch(mode=0o600)
        number = None if self._network is None else self._network.fd
        with self._pipe:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HERE / "podinit.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=() if number is None else (number,),
                start_new_session=True,  # Ctrl-C is for the emulator; it ends its pods itself
                env={},
            )
            threading.Thread(target=self._watch, name=f"pod-{self.name}", daemon=True).start()
            self._write(json.dumps(self.spec.document(self.base, number)))

    @property
    def started(self) -> bool:
        """Is there a process, or has there been one?"""
        return self._process is not None

    def cancel(self) -> None:
        """It will never start."""
        self.state, self.reason, self.exit_code = "Failed", "Cancelled", 137
        self.ended.set()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to process 1, as a failing node, the OOM killer or a person would."""
        with self._pipe:
            self._write(f"signal {int(number)}")

    def terminate(self, grace: float) -> None:
        """End it as the platform does: SIGTERM, and SIGKILL after the grace period."""
        with self._pipe:
            self._write(f"term {grace}")

    def wait(self, timeout: float = 30) -> int:
        """Wait for the end and return the exit code."""
        if not self.ended.wait(timeout):
            raise TimeoutError(f"pod {self.name} is {self.state} after {timeout} s; its log:\n{self.output[-2000:]}")
        assert self.exit_code is not None
        return self.exit_code

    @property
    def alive(self) -> bool:
        """Has it neither succeeded nor failed?"""
        return not self.ended.is_set()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_bytes().decode(errors="replace") if self.log.exists() else ""

    @property
    def root(self) -> Path:
        """The pod's own root, to look into while it runs."""
        return Path(f"/proc/{self.pid}/root")

    def close(self) -> None:
        """End it now, whatever it is doing, and wait until nothing of it is left."""
        if self._process is not None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.close()  # podinit kills its child and ends
            except BrokenPipeError:
                pass
            self.ended.wait(10)

    def _write(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):  # it has ended, or is being closed
            pass

    def _watch(self) -> None:
        """Follow podinit's reports to the end."""
        assert self._process is not None and self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            self._hear(json.loads(line))
        trouble = self._process.stderr.read().decode(errors="replace")
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()
        if self.exit_code is None:  # podinit itself broke, or was killed
            self.exit_code, self.reason, self.message = 128, "RunnerError", trouble.strip()
        self.state = "Succeeded" if self.exit_code == 0 else "Failed"
        self.ended.set()
        self._on_change(self)

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            self.pid, self.state = event["pid"], "Running"
            self._on_change(self)
        elif event["event"] == "refused":
            self.exit_code, self.reason = 128, event["reason"]
            self.message = f"exec: {event['message']}" if event["reason"] == "StartError" else event["message"]
        else:
            self.exit_code, self.reason = event["code"], "Completed" if event["code"] == 0 else "Error"


class Network:
    """A network namespace with loopback only; it exists as long as this object is not closed or a pod lives in it."""

    def __init__(self) -> None:
        self.fd = -1
        self._error: OSError | None = None
        thread = threading.Thread(target=self._make, name="network")  # unshare() here changes this one thread only
        thread.start()
        thread.join()
        if self._error:
            raise self._error

    def _make(self) -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare the network")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # ip link set lo up
                request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP, IFF_RUNNING
                fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS
            self.fd = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._error = error

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def address(number: int) -> str:
    """The address of a job's pod: distinct, and on loopback."""
    return f"127.0.{1 + number // 250}.{1 + number % 250}"
