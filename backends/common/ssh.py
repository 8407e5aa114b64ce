"""Commands on the machine that has sbatch: this one, or one behind SSH.

SSH is the system's own `ssh`, never asking for anything: its configuration, its keys, its known hosts, its words. One
connection is shared by all commands of a launch (ControlMaster), and goes with the launcher. Scripts travel on standard
input, so that no argument list shows them and no login shell reads them.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import screen
from transport import Refusal

CONNECT_S, ANSWER_S = 10, 60.0  # seconds for a connection, and for a command
MARK = b"airlift: here begins the answer\n"  # what a login script prints before it is not ours
REFUSED = re.compile(r"permission denied|host key|identification has changed|too many authentication failures|"
                     r"invalid format|bad permissions|unprotected private key", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    """Where sbatch is. Without a name it is this machine."""

    name: str = ""
    user: str = ""
    port: int | None = None
    identity: str | None = None

    def __str__(self) -> str:
        port = ":%d" % self.port if self.port else ""
        return "%s@%s%s" % (self.user, self.name, port) if self.name else "this machine"

    def command(self) -> list[str]:
        """What runs a shell there."""
        if not self.name:
            return ["sh", "-s"]
        options = ["BatchMode=yes", "ConnectTimeout=%d" % CONNECT_S, "ServerAliveInterval=15", "LogLevel=ERROR",
                   "ControlMaster=auto", "ControlPersist=60", "ControlPath=%s/%%C" % _sockets()]
        argv = ["ssh", *(word for option in options for word in ("-o", option))]
        if self.port:
            argv += ["-p", str(self.port)]
        if self.identity:
            argv += ["-o", "IdentitiesOnly=yes", "-i", self.identity]
        return [*argv, "--", "%s@%s" % (self.user, self.name) if self.user else self.name, "sh -s"]

    def run(self, script: str, seconds: float = ANSWER_S) -> subprocess.CompletedProcess[bytes]:
        """Run a script of POSIX sh there, whatever it returns. Raises Refusal: 4 where the host refuses us, 5 where it
        cannot be reached or does not answer in time."""
        text = "printf '%s\\n'\n(\n%s\n) </dev/null\ncode=$?\n[ $code -ne 255 ] || code=254\nexit $code\n" % (
            MARK.decode().strip(), script)
        try:
            with screen.step("%s: %s" % (self, script)):
                done = subprocess.run(self.command(), input=text.encode(), capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Refusal("%s did not answer in %d s" % (self, seconds), "look whether it is well, then try again",
                          5) from None
        except FileNotFoundError:
            raise Refusal("there is no ssh on this machine", 'install an SSH client, or set tunnel = "local"') from None
        if self.name and done.returncode == 255 and MARK not in done.stdout:
            said = last_lines(done.stderr) or "it closed the connection"
            if REFUSED.search(said):
                raise Refusal("%s refuses the connection: %s" % (self, said),
                              "check user and identity in the profile, and the host's key in known_hosts", 4)
            raise Refusal("%s cannot be reached: %s" % (self, said), "check host, port and the network", 5)
        done.stdout = done.stdout.partition(MARK)[2]
        return done

    def ask(self, script: str, doing: str, seconds: float = ANSWER_S) -> str:
        """What the script prints. Raises Refusal (exit code 4) with the host's own words if it fails."""
        done = self.run(script, seconds)
        if done.returncode:
            said = last_lines(done.stderr) or last_lines(done.stdout) or "exit code %d" % done.returncode
            raise Refusal("%s: cannot %s: %s" % (self, doing, said), "fix what it names, then launch again", 4)
        return done.stdout.decode("utf-8", "replace")


def last_lines(data: bytes) -> str:
    """The last lines of what a command said, as one."""
    return "; ".join(line.strip() for line in data.decode("utf-8", "replace").splitlines()[-4:] if line.strip())[-400:]


@functools.cache
def _sockets() -> str:
    """A private folder for the sockets of shared connections; close() ends them and takes it away."""
    atexit.register(close)
    FOLDERS.append(tempfile.mkdtemp(prefix="airlift-ssh-", dir="/tmp"))  # a socket's path is short
    return FOLDERS[-1]


FOLDERS: list[str] = []


def close() -> None:
    """End the shared connections. The launcher calls it when it ends."""
    while FOLDERS:
        folder = FOLDERS.pop()
        for socket in Path(folder).iterdir():
            subprocess.run(["ssh", "-o", "ControlPath=%s" % socket, "-O", "exit", "there"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    _sockets.cache_clear()
