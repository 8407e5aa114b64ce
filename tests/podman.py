"""Podman's Docker-compatible service, for the tests: a daemon with a socket, real containers, ended by one pid.

    with Podman() as podman:
        podman.environment()      # DOCKER_HOST for a launcher

It lives in mount and process namespaces of its own; images and containers are kept in a folder that goes with it. Its
one image, `plain`, has nothing but places: the tests mount this machine's /usr and Python into it.
"""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

TOOLS = ("podman", "crun", "conmon", "unshare")
CONFIGURATION = """\
[containers]
cgroups = "disabled"
cgroupns = "host"
netns = "host"
default_sysctls = []
log_driver = "%s"
seccomp_profile = "unconfined"
apparmor_profile = "unconfined"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
"""
STORAGE = '[storage]\ndriver = "vfs"\nrunroot = "%(root)s/run"\ngraphroot = "%(root)s/graph"\n'
# Podman wants the one cgroup hierarchy, also where this machine has the older, mixed kind.
START = """\
umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run && mkdir -p /run/lock
exec podman system service -t 0 "unix://$1"
"""


def why_not() -> str | None:
    """Why it cannot be started on this machine; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "podman's service needs Linux and root"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    return "there is no %s here; .ci/run names the packages" % ", ".join(missing) if missing else None


class Podman:
    """The service, from `with` to its end."""

    def __init__(self, log_driver: str = "k8s-file") -> None:
        self.log_driver = log_driver
        self.root = Path(tempfile.mkdtemp(prefix="airlift-podman-", dir="/tmp"))  # short: a socket lies in it
        self.socket = self.root / "socket"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Podman:
        (self.root / "containers.conf").write_text(CONFIGURATION % self.log_driver)
        (self.root / "storage.conf").write_text(STORAGE % {"root": self.root})
        (self.root / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        with open(self.root / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "-m", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", START, "sh",
                 str(self.socket)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent,
                env={"PATH": os.defpath + ":/usr/sbin:/sbin", "CONTAINERS_CONF": str(self.root / "containers.conf"),
                     "CONTAINERS_STORAGE_CONF": str(self.root / "storage.conf"), "HOME": str(self.root)})
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            if time.monotonic() > deadline or self.process.poll() is not None:
                said = (self.root / "log").read_text()
                self.__exit__()
                raise RuntimeError("podman's service did not start: " + said)
            time.sleep(0.05)
        self._image()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def client(self) -> object:
        import docker

        return docker.DockerClient("unix://%s" % self.socket)

    def environment(self) -> dict[str, str]:
        return {"DOCKER_HOST": "unix://%s" % self.socket}

    def mounts(self) -> list[str]:
        """What the image lacks to run Python."""
        return ["%s:%s:ro" % (path, path) for path in sorted({"/usr", sys.prefix, sys.base_prefix})]

    def _image(self) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in ("usr", "etc", "tmp", "root", "proc", "sys", "dev", "run", "var"):
                info = tarfile.TarInfo(name)
                info.type, info.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
                tar.addfile(info)
            for name in ("bin", "sbin", "lib", "lib64"):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = tarfile.SYMTYPE, "usr/" + name
                tar.addfile(info)
        (self.root / "image.tar").write_bytes(buffer.getvalue())
        self.client().api.import_image_from_file(
            str(self.root / "image.tar"), repository="plain", tag="latest", changes=["ENV HF_HOME=/image/hf"])


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: with the tests goes the service
