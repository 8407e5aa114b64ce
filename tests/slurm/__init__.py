"""A real Slurm cluster for the tests: two nodes, slurmdbd, sshd and pyxis's options, on this machine, ended by one pid.

    from tests.slurm import Cluster

    with Cluster() as cluster:
        cluster.on_laptop(["python", "launch.py", ...])       # a person's machine: no shared storage, only SSH
        cluster.on_login(["sbatch", ...])                     # a shell of the cluster's user

Everything runs in namespaces of its own (network, mounts, processes): loopback only, no port taken, nothing changed
outside, and the end of one process is the end of all. `python -m tests.slurm` starts one by hand.

    inside.py      starts the daemons          container.c    pyxis's options, as a SPANK plugin
    *.conf, sshd_config                        the cluster's files; @ROOT@ is the folder that it lives in
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .inside import UID, USER

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
IMAGES = ("registry.example.com/nemo:1", "plain")
TOOLS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sshd", "ssh", "gcc", "git", "ip", "nsenter")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str | None:
    """Why no cluster can be started on this machine; None where one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a cluster needs Linux and root (namespaces)"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=SYSTEM_PATH)]
    return "there is no %s here; .ci/run names the packages" % ", ".join(missing) if missing else None


class Cluster:
    """A cluster, from `with` to its end.

    `shared` is storage that both nodes and the login node see; `laptop` the home of a person elsewhere, who has a key
    for the login node and knows its host key.
    """

    host, port, user, account, images = "127.0.0.1", 2222, USER, "team", IMAGES

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="airlift-slurm-", dir="/tmp"))  # short: sockets lie in it
        self.root.chmod(0o755)
        self.keep = sorted({sys.prefix, sys.base_prefix})  # of an image: the Python that runs the tests
        self.shared, self.home, self.laptop = self.root / "shared", self.root / "home", self.root / "laptop"
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Cluster:
        self._keys()
        python = os.path.realpath(sys.executable)
        with open(self.root / "inside.log", "w") as log:
            self.process = subprocess.Popen(
                ["unshare", "-n", "-m", "--pid", "--fork", "--mount-proc", "--kill-child", python, "-I",
                 str(HERE / "inside.py"), str(self.root), str(REPOSITORY), "\n".join(self.keep), "\n".join(IMAGES)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={"PATH": SYSTEM_PATH, "LANG": "C.UTF-8"}, preexec_fn=_die_with_parent)
        assert self.process.stdout
        if self.process.stdout.readline() != "ready\n":
            said = (self.root / "inside.log").read_text()
            self.__exit__()
            raise RuntimeError("the cluster did not start: " + said)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            if self.process.stdout:
                self.process.stdout.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def _keys(self) -> None:
        ssh = self.laptop / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        (self.root / "home/.ssh").mkdir(parents=True)
        for place in (ssh / "id_ed25519", ssh / "other", self.root / "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place)], check=True)
        host_key = (self.root / "hostkey.pub").read_text()
        (ssh / "known_hosts").write_text("[%s]:%d %s" % (self.host, self.port, host_key))
        (self.root / "home/.ssh/authorized_keys").write_text((ssh / "id_ed25519.pub").read_text())

    # ------------------------------------------------------------ commands

    def on_laptop(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as the person elsewhere: with this repository, but without the cluster's storage."""
        return subprocess.run(self.laptop_command(command), **self._options(options, str(self.laptop)))

    def on_login(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as the cluster's user, on the login node."""
        return subprocess.run(self.login_command(command), **self._options(options, str(self.home)))

    def laptop_command(self, command: list[str]) -> list[str]:
        hide = 'mount -t tmpfs none "$1" && mount -t tmpfs none "$2" && shift 2 && exec "$@"'
        return [*self._enter(), "unshare", "-m", "sh", "-c", hide, "sh", str(self.shared), str(self.home), *command]

    def login_command(self, command: list[str]) -> list[str]:
        return [*self._enter(), "setpriv", "--reuid=%d" % UID, "--regid=%d" % UID, "--clear-groups", *command]

    def environment(self, home: str, **more: str) -> dict[str, str]:
        """What a shell there begins with."""
        return {"PATH": "%s/bin:%s" % (sys.prefix, SYSTEM_PATH), "HOME": home, "LANG": "C.UTF-8", **more}

    def _enter(self) -> list[str]:
        assert self.process
        pid = self.process.pid
        return ["nsenter", "--net=/proc/%d/ns/net" % pid, "--mount=/proc/%d/ns/mnt" % pid,
                "--pid=/proc/%d/ns/pid_for_children" % pid, "--wd=" + str(REPOSITORY)]

    def _options(self, options: dict[str, Any], home: str) -> dict[str, Any]:
        env = self.environment(home, **options.pop("env", {}))
        return {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL, "env": env} | options


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: with the tests goes the cluster
