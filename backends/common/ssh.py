"""Commands on the machine that has sbatch: this one, or a login node by ssh.

It is the system's `ssh`, with its configuration, keys and known hosts, and it never prompts. One connection is shared
by all commands of a launch (ControlMaster), and ends with the launcher. Scripts travel on standard input, so that no
argument list shows them and no login shell interprets them; files that are copied follow on the same way.
"""

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
MARK = b"airlift: here begins the answer\n"  # what comes before it was printed by a login script
REFUSED = re.compile(r"permission denied|host key|identification has changed|too many authentication failures|"
                     r"invalid format|bad permissions|unprotected private key", re.IGNORECASE)


@dataclass(frozen=True)
class Host:
    """The machine that has sbatch; this one if it has no name."""

    name: str = ""
    user: str = ""
    port: int | None = None
    identity: str | None = None

    def __str__(self) -> str:
        port, user = ":%d" % self.port if self.port else "", self.user + "@" if self.user else ""
        return user + self.name + port if self.name else "this machine"

    def command(self, size: int) -> list[str]:
        """The argv that runs there the script that comes first on standard input, of `size` bytes; what follows it is
        for the script to read. dd alone takes no byte too many, and no login shell minds these words."""
        words = "eval \"$(dd bs=1 count=%d 2>/dev/null)\"" % size
        return [*_options(self), "--", self.name, "exec sh -c '%s'" % words] if self.name else ["sh", "-c", words]

    def run(self, script: str, seconds: float = ANSWER_S, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a script of POSIX sh there, with `data` on its standard input. Raises Refusal if the host refuses (exit
        code 4) or does not answer (5)."""
        text = ("printf '%s\n'\n(\n%s\n)%s\ncode=$?\n[ $code -ne 255 ] || code=254\nexit $code\n" % (
            MARK.decode().strip(), script, "" if data else " </dev/null")).encode()
        try:
            with screen.step("%s: %s" % (self, script)):
                done = subprocess.run(self.command(len(text)), input=text + data, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Refusal("%s did not answer in %d s" % (self, seconds),
                          "check its load and the network, then try again", 5) from None
        except FileNotFoundError:
            raise Refusal("there is no ssh on this machine", 'install an SSH client, or set tunnel = "local"') from None
        if self.name and done.returncode == 255 and MARK not in done.stdout:
            why = last_lines(done.stderr) or "it closed the connection"
            if REFUSED.search(why):
                raise Refusal("%s refuses the connection: %s" % (self, why), "check user and identity, and the host's "
                              "key in known_hosts; a second factor needs a ControlMaster that you have opened", 4)
            raise Refusal("%s cannot be reached: %s" % (self, why), "check host, port and the network", 5)
        if MARK not in done.stdout:
            raise Refusal("%s: its shell ran nothing: %s" % (self, last_lines(done.stderr) or "it said nothing"),
                          "see whether its login runs sh and dd", 4)
        done.stdout = done.stdout.partition(MARK)[2]
        return done

    def output(self, script: str, doing: str, seconds: float = ANSWER_S, data: bytes = b"") -> str:
        """What the script prints. Raises Refusal (exit code 4) with its error output if it fails."""
        done = self.run(script, seconds, data)
        if done.returncode:
            why = last_lines(done.stderr) or last_lines(done.stdout) or "exit code %d" % done.returncode
            raise Refusal("%s: cannot %s: %s" % (self, doing, why), "fix what it names, then launch again", 4)
        return done.stdout.decode("utf-8", "replace")


def last_lines(data: bytes) -> str:
    """The last four lines of a command's output, as one line."""
    return "; ".join(line.strip() for line in data.decode("utf-8", "replace").splitlines()[-4:] if line.strip())[-400:]


# Settings of ~/.ssh/config that would keep a command from being run, as `ssh -G` prints them, and what does not.
IN_THE_WAY = {"remotecommand": "none", "requesttty": "auto", "sessiontype": "default", "stdinnull": "no",
              "forkafterauthentication": "no", "clearallforwardings": "yes"}


@functools.cache
def _options(host: Host) -> tuple[str, ...]:
    """The ssh that reaches the host. Ports, users, jumps and keys are those of the user's configuration, unless the
    profile has its own; so is a shared connection of theirs that is open, since it may be the only way in."""
    argv = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=%d" % CONNECT_S, "-o", "LogLevel=ERROR"]
    for option, value in (("-p", host.port), ("-l", host.user), ("-i", host.identity)):
        argv += [option, str(value)] if value else []
    argv += ["-o", "IdentitiesOnly=yes"] if host.identity else []
    said = subprocess.run([*argv, "-G", "--", host.name], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = dict(line.partition(" ")[::2] for line in said.stdout.splitlines())
    for name, wanted in IN_THE_WAY.items():
        if found.get(name, wanted) not in (wanted, {"no": "false", "yes": "true"}.get(wanted)):
            argv += ["-o", "%s=%s" % (name, wanted)]
    alive = found.get("controlpath", "none") != "none" and not subprocess.run(
        [*argv, "-O", "check", "--", host.name], capture_output=True, stdin=subprocess.DEVNULL).returncode
    if not alive:
        argv += ["-o", "ServerAliveInterval=15", "-o", "ControlMaster=auto", "-o", "ControlPersist=60",
                 "-o", "ControlPath=%s/%%C" % _sockets()]
    return tuple(argv)


@functools.cache
def _sockets() -> str:
    """A private folder for the sockets of shared connections; close() ends them and removes it."""
    atexit.register(close)
    return tempfile.mkdtemp(prefix="airlift-ssh-", dir="/tmp")  # a socket's path must be short


def close() -> None:
    """End the shared connections; called when the launcher ends."""
    if _sockets.cache_info().currsize:
        for socket in Path(_sockets()).iterdir():
            subprocess.run(["ssh", "-o", "ControlPath=%s" % socket, "-O", "exit", "there"], capture_output=True)
        shutil.rmtree(_sockets(), ignore_errors=True)
        _sockets.cache_clear()
        _options.cache_clear()
