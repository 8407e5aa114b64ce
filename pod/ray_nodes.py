"""A Ray cluster that the job's own pods form: each pod's part of it is a process of its own, started by the recipe's
bash once the tree is in place and the startup commands have run.

Rank 0 listens on MASTER_PORT, and every other pod keeps a connection to it, with one JSON object a line:

    {"run", "rank", "at"}                  a worker's first word; "at" is rank 0's address as the worker sees it
    {"join", "env"}                        rank 0's Ray address, once all pods have come and its head runs
    {"up": true}                           `ray start` has registered the worker's node
    {"lost": why}                          a worker's Ray has ended
    {"end": code}                          the driver's exit code, with which every pod ends

When all nodes are up, rank 0 runs the recipe with RAY_ADDRESS, as the cluster's driver. Until then everything waits
`patience` seconds at most. A connection that ends without a word is a pod that is gone; keepalive tells of a machine
that is. What Ray leaves running ends with the pod, which ends all its orphans; `ray stop` would end those of other
jobs, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time

from pod.failures import LOST, RAY, TOOL, Failure, complain, say
from pod.places import Places
from pod.process import Child, become_subreaper, children_of
from pod.rank import free_port


class RayNode:
    """What is the same for rank 0 and the others."""

    def __init__(self, settings: dict) -> None:
        self.run, self.rank, self.nodes = settings["run"], settings["rank"], settings["nodes"]
        self.patience, self.command = settings["patience"], settings["command"]
        self.deadline = time.monotonic() + self.patience
        self.env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.address, self.port = self.env["MASTER_ADDR"], int(self.env["MASTER_PORT"])
        self.daemons: dict[int, str] = {}  # pid -> name
        become_subreaper()

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def own_address(self, seen: str) -> str:
        """This node's address for Ray. On one machine each rank has one of its own, for 127.0.0.1 is not one to Ray."""
        return "127.77.%d.%d" % (self.rank // 250, 1 + self.rank % 250) if seen.startswith("127.") else seen

    def start(self, *words: str) -> None:
        """`ray start`, which returns when the node is registered. Raises Failure(TOOL or RAY)."""
        # Worker ports from the kernel: Ray's own range is the same for every node, and two may be on one machine.
        argv = ["ray", "start", *words, "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
        with tempfile.TemporaryFile() as output:
            try:
                subprocess.run(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True,
                               timeout=self.left(), start_new_session=True)
            except OSError as error:
                raise Failure(TOOL, "ray cannot be started: %s" % error.strerror) from None
            except subprocess.SubprocessError as error:
                output.seek(0)
                for line in output.read().decode("utf-8", "replace").splitlines()[-20:]:
                    say("ray start: " + line)
                code = getattr(error, "returncode", None)
                raise Failure(RAY, "`ray start` took more than the %d s there were" % self.patience if code is None else
                              "`ray start` ended with exit code %d" % code) from None
        self.daemons = {pid: name for pid, name in children_of(os.getpid()).items() if name in ("raylet", "gcs_server")}

    def ended_daemon(self) -> str:
        """The name of a part of Ray without which this node is none, once it has ended; else ""."""
        for pid, name in self.daemons.items():
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return name
            except ChildProcessError:
                return name
        return ""


class RayWorker(RayNode):
    def main(self) -> int:
        """Join, and stay until the driver has ended. The driver's code. Raises Failure."""
        for number in Child.SIGNALS:
            signal.signal(number, self.heed)
        line = self.connect()
        self.deadline = time.monotonic() + self.patience + 10  # from here on rank 0 counts, and says when it gives up
        line.send({"run": self.run, "rank": self.rank, "at": line.socket.getpeername()[0]})
        while True:
            ended = self.ended_daemon()
            if ended:
                line.send({"lost": "its %s has ended" % ended})
                raise Failure(LOST, "the %s of this pod has ended" % ended)
            for message in line.read(0.2):
                if "end" in message:
                    return int(message["end"])
                if "join" in message:
                    self.join(line, message)
            if line.closed:
                raise Failure(LOST if self.daemons else RAY, "rank 0 is gone")
            if not self.daemons and not self.left():
                raise Failure(RAY, "rank 0 had no cluster to join within %d s" % self.patience)

    def heed(self, number: int, _frame: object) -> None:
        """As a node of the cluster, stay until the driver, which got the same signal, has saved what it wants to."""
        if not self.daemons:
            raise SystemExit(128 + number)

    def join(self, line: Line, message: dict) -> None:
        self.env.update(message["env"])
        try:
            self.start("--address", message["join"], "--node-ip-address",
                       self.own_address(line.socket.getsockname()[0]))
        except Failure as failure:
            line.send({"lost": failure.seen})
            raise
        line.send({"up": True})

    def connect(self) -> Line:
        said = "nothing was tried"
        while self.left():
            try:
                return Line(socket.create_connection((self.address, self.port), timeout=min(10.0, self.left())))
            except OSError as error:  # its pod does not run yet, or its name is not known yet
                said = error.strerror or str(error)
            time.sleep(min(0.5, self.left()))
        raise Failure(RAY, "rank 0 did not answer at %s:%d within %d s: %s"
                      % (self.address, self.port, self.patience, said))


class RayHead(RayNode):
    def main(self) -> int:
        """The whole cluster, from its pods to the driver's exit code. Raises Failure."""
        self.lines: dict[int, Line] = {}  # rank -> its connection
        self.driver: subprocess.Popen | None = None
        self.signalled = False
        for number in Child.SIGNALS:
            signal.signal(number, self.forward)
        code = 128 + signal.SIGTERM
        try:
            self.gather()
            address = self.head()
            self.await_nodes()
            say("rank 0: a Ray cluster of %d nodes is up at %s" % (self.nodes, address))
            code = self.drive()
        except (Failure, SystemExit) as error:
            code = int(error.code or 0)
            raise
        finally:
            for line in self.lines.values():
                line.send({"end": code})
        return code

    def forward(self, number: int, _frame: object) -> None:
        """A signal for all of us goes to the driver; before there is one, this is the end."""
        if self.driver is None:
            raise SystemExit(128 + number)
        self.signalled = True
        self.end_driver(number)

    def gather(self) -> None:
        """Wait until every pod has come."""
        host = self.address if re.fullmatch(r"[0-9.]+", self.address) else ""  # a name may lead elsewhere from here
        try:
            server = socket.create_server((host, self.port))
        except OSError as error:
            raise Failure(RAY, "rank 0 cannot listen at %s:%d: %s" % (host, self.port, error.strerror)) from None
        new: list[Line] = []
        with server:
            while len(self.lines) < self.nodes - 1:
                if not self.left():
                    missing = [str(rank) for rank in range(1, self.nodes) if rank not in self.lines]
                    raise Failure(RAY, "of %d pods, rank %s did not come within %d s"
                                  % (self.nodes, ", ".join(missing), self.patience))
                if select.select([server], [], [], 0.1)[0]:
                    new.append(Line(server.accept()[0]))
                new = [line for line in new if not self.greeted(line)]
                self.lines = {rank: line for rank, line in self.lines.items() if not (line.read(0) or line.closed)}

    def greeted(self, line: Line) -> bool:
        """Whether this connection needs no more looking at: it is one of ours now, or was none."""
        for message in line.read(0):
            rank = message.get("rank")
            if message.get("run") == self.run and isinstance(rank, int) and 0 < rank < self.nodes:
                line.at = str(message.get("at"))
                self.lines[rank] = line
                return True
            line.close()
        return line.closed

    def head(self) -> str:
        """Start Ray's head and tell the others. Its address."""
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(self.env):
            self.env.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()})  # nobody else may join
        self.env["MASTER_PORT"] = str(free_port())  # the one we had is ours
        at = self.own_address(next(iter(self.lines.values())).at)
        address = "%s:%d" % (at, free_port())
        self.start("--head", "--node-ip-address", at, "--port", address.rpartition(":")[2],
                   "--temp-dir", folder(self.env, self.run), "--include-dashboard=false",
                   "--ray-client-server-port", str(free_port()))
        shared = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MASTER_PORT")
        for line in self.lines.values():
            line.send({"join": address, "env": {name: self.env[name] for name in shared if name in self.env}})
        self.env["RAY_ADDRESS"] = address
        return address

    def await_nodes(self) -> None:
        up: set[int] = set()
        while len(up) < self.nodes - 1:
            if not self.left():
                missing = [str(rank) for rank in sorted(set(self.lines) - up)]
                raise Failure(RAY, "rank %s did not join within %d s" % (", ".join(missing), self.patience))
            for rank, line in self.lines.items():
                for message in line.read(0.05):
                    if "lost" in message:
                        raise Failure(RAY, "rank %d could not join: %s" % (rank, message["lost"]))
                    up.add(rank)
                if line.closed:
                    raise Failure(RAY, "rank %d is gone" % rank)
            self.check_own()

    def drive(self) -> int:
        """Run the recipe as the cluster's driver, and watch the others meanwhile."""
        self.driver = subprocess.Popen(["bash", "-c", self.command], env=self.env, stdin=subprocess.DEVNULL,
                                       start_new_session=True)
        while self.driver.poll() is None:
            try:
                self.check_nodes()
            except Failure:
                self.end_driver(signal.SIGTERM)
                try:
                    self.driver.wait(5)
                except subprocess.TimeoutExpired:
                    self.end_driver(signal.SIGKILL)
                raise
            time.sleep(0.1)
        if self.signalled:  # perhaps just because a node is lost: platforms end the other pods then
            self.check_nodes()
        return self.driver.returncode if self.driver.returncode >= 0 else 128 - self.driver.returncode

    def check_nodes(self) -> None:
        """Raises Failure(LOST) if there is a node less."""
        self.check_own()
        for rank, line in self.lines.items():
            for message in line.read(0):
                raise Failure(LOST, "rank %d: %s" % (rank, message.get("lost")))
            if line.closed:
                raise Failure(LOST, "rank %d is gone" % rank)

    def end_driver(self, number: int) -> None:
        if self.driver:
            with contextlib.suppress(OSError):  # it has ended
                os.killpg(self.driver.pid, number)

    def check_own(self) -> None:
        ended = self.ended_daemon()
        if ended:
            raise Failure(LOST, "the %s of rank 0 has ended" % ended)


class Line:
    """A connection that carries one JSON object a line."""

    MOST = 65536  # bytes of a line

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.rest, self.closed, self.at = connection, b"", False, ""
        connection.settimeout(5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # read() tells
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, wait: float) -> list[dict]:
        """The messages that have come, after at most `wait` seconds; `closed` says that no more will."""
        found: list[dict] = []
        while not self.closed and select.select([self.socket], [], [], 0 if found else wait)[0]:
            data = b""
            with contextlib.suppress(OSError):
                data = self.socket.recv(self.MOST)
            *whole, self.rest = (self.rest + data).split(b"\n")
            try:
                found += [message for message in map(json.loads, whole) if isinstance(message, dict)]
            except (ValueError, RecursionError):
                data = b""
            if not data or len(self.rest) > self.MOST:
                self.close()
        return found

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def folder(env: dict[str, str], run: str) -> str:
    """Where Ray keeps sockets and logs on every node; short, for a socket's path has 107 characters at most."""
    return os.path.join(env.get("RAY_TMPDIR") or "/tmp", "airlift-%s-ray" % run)


def command_for(job: dict, places: Places, rank: int, env: dict[str, str]) -> str:
    """What bash runs in place of the recipe: this program again, as RayHead or RayWorker."""
    settings = dict({name: job[name] for name in ("run", "nodes", "command", "patience")}, rank=rank)
    words = [sys.executable or "python3", "-I", "-S", places.program(env), "ray", json.dumps(settings)]
    return " ".join(map(shlex.quote, words))


def main(words: str) -> int:
    """Be this pod's part. The exit code."""
    settings = json.loads(words)
    try:
        return (RayWorker if settings["rank"] else RayHead)(settings).main()
    except Failure as failure:
        return complain(str(settings["rank"]), failure)
    except SystemExit as early:
        return int(early.args[0])
