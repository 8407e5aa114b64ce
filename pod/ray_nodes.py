"""A Ray cluster that the job's own pods form: each pod's part of it is a process of its own, started by the recipe's
bash once the tree is in place and the startup commands have run.

Rank 0 listens on MASTER_PORT, and every other pod keeps a connection to it (peers.py), on which they say:

    rank 0: {"ray", "master"}              two ports of rank 0: Ray's, once its head runs, and a new MASTER_PORT
    worker: {"up": true}                   `ray start` has registered the worker's node
    worker: {"lost": why}                  a worker's Ray has ended
    rank 0: {"end": code}                  the driver's exit code, with which every pod ends

Ray's own token follows from the job's secret, so it is never sent. When all nodes are up, rank 0 runs the recipe with
RAY_ADDRESS, as the cluster's driver. Until then everything waits `patience` seconds at most. What Ray leaves running
ends with the pod, which ends all its orphans; `ray stop` would end those of other jobs, too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from pod.failures import LOST, RAY, TOOL, Failure, complain, say
from pod.payload import read_file, whole
from pod.peers import Line, Pods, keyed, proven_head
from pod.places import Places, no_place, private
from pod.process import HEED, Child, become_subreaper, children_of
from pod.rank import RAY_LIMITS, free_port


class RayNode:
    """What is the same for rank 0 and the others."""

    def __init__(self, settings: dict) -> None:
        self.run, self.rank, self.nodes = settings["run"], settings["rank"], settings["nodes"]
        self.patience, self.script, self.secret = settings["patience"], settings["script"], settings["secret"]
        self.deadline = time.monotonic() + self.patience
        self.env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(self.env):
            self.env.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": keyed(self.secret, "ray")})
        self.env = dict(RAY_LIMITS, **self.env)
        self.env.setdefault("RAY_enable_metrics_collection", "0")  # its port answers everybody
        self.address, self.port = self.env["MASTER_ADDR"], int(self.env["MASTER_PORT"])
        self.daemons: dict[int, str] = {}  # pid -> name
        become_subreaper()

    def left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def address_of(self, rank: int, seen: str, port: int = 0) -> str:
        """A node's address for Ray. On one machine each rank has one of its own, for 127.0.0.1 is not one to Ray."""
        host = "127.77.%d.%d" % (rank // 250, 1 + rank % 250) if seen.startswith("127.") else seen
        return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port) if port else host

    def start(self, *words: str) -> None:
        """`ray start`, which returns when the node is registered. Raises Failure(TOOL, PLACE or RAY)."""
        try:  # Ray opens its own folders to all users, so they lie in one that is not
            place = os.path.join(private(folder(self.env, self.run)), "ray")
        except OSError as error:
            raise no_place(error, "RAY_TMPDIR") from None
        # Ports from the kernel: Ray's own are the same for every node, and two may be on one machine.
        argv = ["ray", "start", *words, "--temp-dir", place, "--disable-usage-stats", "--min-worker-port=0",
                "--max-worker-port=0", "--dashboard-agent-listen-port", str(free_port())]
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
            signal.signal(number, self.heed if number in Child.ENDING else lambda *_: None)
        line = self.connect()
        self.deadline = time.monotonic() + self.patience + 10  # from here on rank 0 counts, and says when it gives up
        while True:
            ended = self.ended_daemon()
            if ended:
                line.send({"lost": "its %s has ended" % ended})
                raise Failure(LOST, "the %s of this pod has ended" % ended)
            for message in line.read(0.2):
                code: Any = message.get("end")
                ports: list[Any] = [message.get("ray"), message.get("master")]
                if whole(code, 0) and code < 256:
                    return int(code)
                if not all(whole(port) and port < 65536 for port in ports):
                    raise Failure(RAY, "rank 0 says what has no meaning")
                self.join(line, *ports)
            if line.closed:
                raise Failure(LOST if self.daemons else RAY, "rank 0 is gone")
            if not self.daemons and not self.left():
                raise Failure(RAY, "rank 0 had no cluster to join within %d s" % self.patience)

    def heed(self, number: int, _frame: object) -> None:
        """As a node of the cluster, stay until the driver, which got the same signal, has saved what it wants to."""
        if not self.daemons:
            raise SystemExit(128 + number)

    def join(self, line: Line, ray: int, master: int) -> None:
        self.env["MASTER_PORT"] = str(master)
        here, there = line.socket.getsockname()[0], line.socket.getpeername()[0]
        try:
            self.start("--address", self.address_of(0, there, ray), "--node-ip-address",
                       self.address_of(self.rank, here))
        except Failure as failure:
            line.send({"lost": failure.seen})
            raise
        line.send({"up": True})

    def connect(self) -> Line:
        """A connection to rank 0, which has proven that it is that. Raises Failure."""
        said = "nothing was tried"
        while self.left():
            try:
                line = Line(socket.create_connection((self.address, self.port), timeout=min(10.0, self.left())))
                if proven_head(line, self.secret, self.rank, self.left()):
                    return line
                line.socket.close()
                said = "what answers there does not prove that it is rank 0 of this job"
            except OSError as error:  # its pod does not run yet, or its name is not known yet
                said = error.strerror or str(error)
            time.sleep(min(0.5, self.left()))
        raise Failure(RAY, "rank 0 did not answer at %s:%d within %d s: %s"
                      % (self.address, self.port, self.patience, said))


class RayHead(RayNode):
    def main(self) -> int:
        """The whole cluster, from its pods to the driver's exit code. Raises Failure."""
        self.driver: subprocess.Popen | None = None
        self.signalled = False
        for number in Child.SIGNALS:
            signal.signal(number, self.forward)
        self.pods = Pods(self.secret, self.nodes, self.listen)
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
            self.pods.tell({"end": code})
        return code

    def forward(self, number: int, _frame: object) -> None:
        """A signal for all of us goes to the driver; before there is one, this is the end."""
        if self.driver is None and number in Child.ENDING:
            raise SystemExit(128 + number)
        self.signalled |= number in Child.ENDING
        self.end_driver(number)

    def listen(self) -> socket.socket:
        """At the address that MASTER_ADDR means on this machine. All addresses only where it means none of them (that
        of a service, or of a router), or, as a machine's own name often does, one that no other machine can reach."""
        found: list[Any] = []
        with contextlib.suppress(OSError):
            found = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)
        reached = [(at, family) for family, _, _, _, at in found if self.address in ("localhost", at[0])
                   or not (at[0].startswith("127.") or at[0] == "::1")]
        for at, family in [*reached, (("", self.port), socket.AF_INET)]:
            try:
                return socket.create_server(at[:2], family=family, backlog=4096)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise Failure(RAY, "rank 0 cannot listen at %s:%d: %s"
                                  % (at[0], self.port, error.strerror)) from None
        raise Failure(RAY, "rank 0 cannot listen at port %d" % self.port)

    def gather(self) -> None:
        """Wait until every pod has come. One that goes, or talks before it is asked, may come again."""
        while len(self.pods.lines) < self.nodes - 1:
            if not self.left():
                missing = set(range(1, self.nodes)) - set(self.pods.lines)
                raise Failure(RAY, "of %d pods, %s did not come within %d s"
                              % (self.nodes, named(missing), self.patience))
            for rank, message in self.pods.heard(min(1.0, self.left())):
                if message and rank in self.pods.lines:
                    self.pods.forget(self.pods.lines[rank])
        self.pods.close()

    def head(self) -> str:
        """Start Ray's head and tell the others. Its address."""
        at = self.address_of(0, next(iter(self.pods.lines.values())).socket.getsockname()[0])
        ray, master = free_port(), free_port()
        self.env["MASTER_PORT"] = str(master)  # the one we had is ours
        # The dashboard is ray.util.state's server. Without the autoscaler's monitor, whose only port answers everybody.
        # The client server cannot be left out.
        self.start("--head", "--node-ip-address", at, "--port", str(ray), "--include-dashboard=true", "--no-monitor",
                   "--dashboard-host", at, "--dashboard-port", str(free_port()),
                   "--ray-client-server-port", str(free_port()))
        self.pods.tell({"ray": ray, "master": master})
        self.env["RAY_ADDRESS"] = self.address_of(0, at, ray)
        return self.env["RAY_ADDRESS"]

    def await_nodes(self) -> None:
        up: set[int] = set()
        while len(up) < self.nodes - 1:
            if not self.left():
                raise Failure(RAY, "%s did not join within %d s" % (named(set(self.pods.lines) - up), self.patience))
            self.check_own()
            for rank, message in self.pods.heard(min(0.2, self.left())):
                if message != {"up": True}:
                    raise Failure(RAY, "rank %d could not join: %s" % (rank, why(message)))
                up.add(rank)

    def drive(self) -> int:
        """Run the recipe as the cluster's driver, and watch the others meanwhile."""
        self.driver = subprocess.Popen(["bash", self.script], env=self.env, stdin=subprocess.DEVNULL,
                                       start_new_session=True)
        while self.driver.poll() is None:
            try:
                self.check_nodes(0.1)
            except Failure as failure:
                code = complain("0", failure)  # said now, since a platform may end this pod before the driver has ended
                self.end_driver(signal.SIGTERM)
                try:
                    self.driver.wait(5)
                except subprocess.TimeoutExpired:
                    self.end_driver(signal.SIGKILL)
                raise SystemExit(code) from None
        if self.signalled:  # perhaps just because a node is lost: platforms end the other pods then
            self.check_nodes(0.0)
        return self.driver.returncode if self.driver.returncode >= 0 else 128 - self.driver.returncode

    def check_nodes(self, wait: float) -> None:
        """Raises Failure(LOST) if there is a node less, after at most `wait` seconds."""
        self.check_own()
        for rank, message in self.pods.heard(wait):
            raise Failure(LOST, "rank %d: %s" % (rank, why(message)))

    def end_driver(self, number: int) -> None:
        if self.driver:
            with contextlib.suppress(OSError):  # it has ended
                os.killpg(self.driver.pid, number)

    def check_own(self) -> None:
        ended = self.ended_daemon()
        if ended:
            raise Failure(LOST, "the %s of rank 0 has ended" % ended)


def named(ranks: set[int]) -> str:
    more = ", ... (%d of them)" % len(ranks) if len(ranks) > 20 else ""
    return "rank " + ", ".join(map(str, sorted(ranks)[:20])) + more


def why(message: dict[str, Any] | None) -> str:
    """What a worker says of its end, on one line; without a word it is gone."""
    return "it is gone" if message is None else " ".join(str(message.get("lost")).split())[:1000]


def folder(env: dict[str, str], run: str) -> str:
    """Where Ray keeps sockets and logs on every node; short, for a socket's path has 107 characters at most."""
    return os.path.join(env.get("RAY_TMPDIR") or "/tmp", "airlift-%s-ray" % run)


def command_for(job: dict, places: Places, rank: int, env: dict[str, str]) -> str:
    """What bash runs in place of the recipe: this program again, as RayHead or RayWorker."""
    settings = {name: job[name] for name in ("run", "nodes", "patience", "secret")}
    settings.update(rank=rank, script=places.keep("recipe.sh", (HEED + "\n" + job["command"]).encode()))
    words = [sys.executable or "python3", "-I", "-S", places.program(env), "ray",
             places.keep("ray.json", json.dumps(settings).encode())]
    return " ".join(map(shlex.quote, words))


def main(path: str) -> int:
    """Be this pod's part. The exit code."""
    settings = read_file(path)
    try:
        return (RayWorker if settings["rank"] else RayHead)(settings).main()
    except Failure as failure:
        return complain(str(settings["rank"]), failure)
    except SystemExit as early:
        return int(early.args[0])
