"""Connections between the pods of one job: one JSON object a line, once both ends have proven who they are.

The job's secret came with the chunks; nobody else has it, and it is never sent. Until both proofs have been seen,
nothing is told and nothing believed:

    rank 0: {"nonce"}                      a random text, to whoever connects
    worker: {"rank", "nonce", "proof"}     HMAC-SHA256 by the secret, over the role, the rank and both random texts
    rank 0: {"proof"}                      the same in its own role; a rank that is held stays held, and it closes

Whoever connects costs little: a short line, some seconds and one of a number of places are all that is given to those
who have proven nothing. A connection that ends is a pod that is gone; keepalive tells of a machine that is.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import resource
import selectors
import socket
import time
from typing import Any, Callable

from pod.failures import RAY, Failure
from pod.payload import whole


def keyed(secret: str, *words: object) -> str:
    """HMAC-SHA256 of the words, by the job's secret."""
    return hmac.new(secret.encode(), json.dumps(words).encode(), hashlib.sha256).hexdigest()


def same(proof: object, wanted: str) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(proof.encode("utf-8", "replace"), wanted.encode())


def proven_head(line: Line, secret: str, rank: int, patience: float) -> bool:
    """Prove to the other end that we are that rank of this job, and see whether it proves that it is rank 0."""
    both = rank, line.word("nonce", patience), line.nonce
    line.send({"rank": rank, "nonce": line.nonce, "proof": keyed(secret, "worker", *both)})
    return same(line.word("proof", patience), keyed(secret, "head", *both))


class Line:
    """A connection that carries one JSON object a line. What is too long, or no such object, closes it."""

    BEFORE, AFTER = 512, 8192  # bytes of a line, before and after the other end has proven itself

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.closed = connection, False
        self.rest, self.most = b"", self.BEFORE
        self.waiting: list[dict[str, Any]] = []
        self.rank, self.nonce, self.since = 0, os.urandom(16).hex(), time.monotonic()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """All of it without waiting, or the connection ends: what we say is short, so its end does not read."""
        data = json.dumps(message).encode() + b"\n"
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            if self.socket.send(data) < len(data):
                self.socket.shutdown(socket.SHUT_RDWR)  # the next read() tells

    def read(self, wait: float = 0.0) -> list[dict[str, Any]]:
        """The messages that have come, after at most `wait` seconds; `closed` says that no more will."""
        found, self.waiting = self.waiting, []
        if found:
            return found
        self.socket.settimeout(wait)
        try:
            data = self.socket.recv(4096)
        except (BlockingIOError, socket.timeout):
            return []
        except OSError:
            data = b""
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            found = [message for message in map(json.loads, lines) if isinstance(message, dict)]
        except (ValueError, RecursionError):
            pass
        if not data or len(found) < len(lines) or max(map(len, [*lines, self.rest])) > self.most:
            self.closed = True
        return found

    def word(self, name: str, patience: float) -> object:
        """A field of the next message, which is waited for 10 s at most; None where it lacks it, or nothing comes."""
        until = time.monotonic() + min(10.0, patience)
        while not self.closed and time.monotonic() < until:
            found = self.read(0.2)
            if found:
                self.waiting = found[1:]
                return found[0].get(name)
        return None


class Pods:
    """Rank 0's connections: by rank those that have proven to be a pod of this job, and those that have not, which may
    be anybody's. Each round costs what has come in it, however many are silent."""

    NEW, PROOF_S = 1024, 10.0  # how many may be without proof, and for how many seconds; the oldest goes first

    def __init__(self, secret: str, nodes: int, listen: Callable[[], socket.socket]) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.most = min(self.NEW, hard - nodes - 100)
        if self.most < 16:
            raise Failure(RAY, "rank 0 may open %d files, too few for %d pods: raise its hard limit (ulimit -Hn)"
                          % (hard, nodes))
        self.secret, self.nodes, self.server = secret, nodes, listen()
        self.server.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.server, selectors.EVENT_READ)
        self.lines: dict[int, Line] = {}
        self.new: dict[Line, None] = {}  # oldest first

    def heard(self, wait: float) -> list[tuple[int, dict[str, Any] | None]]:
        """(rank, message) of what the pods have said, after at most `wait` seconds; None: that one is gone."""
        said: list[tuple[int, dict[str, Any] | None]] = []
        for key, _ in self.selector.select(wait):
            line = key.data
            if line is None:
                self.accept()
                continue
            for message in [] if line.closed else line.read():
                if line.rank:
                    said.append((line.rank, message))
                elif not self.proven(line, message):
                    line.closed = True
                    break
            if line.closed and line.rank:
                said.append((line.rank, None))
            if line.closed:
                self.forget(line)
        while self.new and next(iter(self.new)).since < time.monotonic() - self.PROOF_S:
            self.forget(next(iter(self.new)))
        return said

    def accept(self) -> None:
        for _ in range(64):  # then those that are here get their turn
            try:
                line = Line(self.server.accept()[0])
            except OSError:  # there is no other one, or it has gone again
                return
            self.new[line] = None
            self.selector.register(line.socket, selectors.EVENT_READ, line)
            line.send({"nonce": line.nonce})
            if len(self.new) > self.most:
                self.forget(next(iter(self.new)))

    def proven(self, line: Line, message: dict[str, Any]) -> bool:
        """Whether this is the proof of a rank that nobody holds; then the connection is that rank's."""
        rank: Any = message.get("rank")
        theirs = message.get("nonce")
        if not whole(rank) or rank >= self.nodes or rank in self.lines or not isinstance(theirs, str) or not same(
                message.get("proof"), keyed(self.secret, "worker", rank, line.nonce, theirs)):
            return False
        line.rank, line.most = rank, line.AFTER
        self.lines[rank] = line
        del self.new[line]
        line.send({"proof": keyed(self.secret, "head", rank, line.nonce, theirs)})
        return True

    def tell(self, message: dict[str, Any]) -> None:
        for line in self.lines.values():
            line.send(message)

    def forget(self, line: Line) -> None:
        line.closed = True
        self.selector.unregister(line.socket)
        line.socket.close()
        self.new.pop(line, None)
        if self.lines.get(line.rank) is line:
            del self.lines[line.rank]

    def close(self) -> None:
        """Let nobody else in."""
        for line in list(self.new):
            self.forget(line)
        self.selector.unregister(self.server)
        self.server.close()
