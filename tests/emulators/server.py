"""A strict HTTP server on loopback: routes, queries, a log of requests, and faults on demand. Knows no platform.

Strict means: an unknown route is 404, a known one with another method 405, an unknown query parameter 400, a body that
is not JSON 400. A handler says no by raising `Refusal`. An exception in a handler is a bug of the emulator: the client
gets 500 and `close()` raises, so that no test passes over it.

Faults (`server.fault(...)`) stand in for a bad day between client and server: an error status, a slow answer, a
connection that breaks before or in the middle of one, or no answer at all; for the next N requests that match.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

BODY_LIMIT = 3 * 1024 * 1024  # what a Kubernetes API server reads of a request
FAULTS = ("status", "slow", "reset", "drop", "hang")


class Logged(NamedTuple):
    """One request: the path is without the base and without the query; status 0 means that no answer went out."""

    method: str
    path: str
    status: int


class Refusal(Exception):
    """The answer is no."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


@dataclass
class Request:
    """What a handler gets; `params` are the {names} of its route."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    params: dict[str, str] = field(default_factory=dict)

    def one(self, name: str, default: str = "") -> str:
        """The (last) value of a query parameter."""
        return self.query.get(name, [default])[-1]

    def number(self, name: str, default: int, lowest: int = 0) -> int:
        """A query parameter that must be a number."""
        text = self.one(name, str(default))
        if not text.isdecimal() or int(text) < lowest:
            raise Refusal(400, f"query parameter {name}={text!r} must be a number not below {lowest}")
        return int(text)

    def json(self) -> Any:
        """The body."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None


@dataclass
class Reply:
    """What a handler gives: a JSON body, or a stream of text that is sent in chunks as it comes."""

    status: int = 200
    body: Any = None
    stream: Iterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """A method and a path like /jobs/{id}; `query` names the parameters that may be there."""

    method: str
    pattern: str
    handler: Callable[[Request], Reply]
    query: tuple[str, ...] = ()
    public: bool = False

    def match(self, path: str) -> dict[str, str] | None:
        """The path's {names}, or None."""
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.pattern)
        found = re.fullmatch(re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern), path)
        return None if found is None else {name: unquote(value) for name, value in found.groupdict().items()}


@dataclass
class Fault:
    """Trouble for the next `times` requests that match."""

    kind: str
    times: int
    method: str | None
    path: str
    status: int
    seconds: float
    retry_after: float | None
    message: str
    done: bool


class HttpServer:
    """Base of both control planes; a context manager."""

    base = ""  # what every path of the plane begins with; left out of the log

    def __init__(self, port: int = 0) -> None:
        self.requests: list[Logged] = []
        self.errors: list[str] = []
        self.closing = threading.Event()
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._faults: list[Fault] = []
        self._httpd = _Listener(("127.0.0.1", port), self)
        self.port: int = self._httpd.server_address[1]
        self.origin = f"http://127.0.0.1:{self.port}"
        self.url = self.origin + self.base
        self._listeners = [self._httpd]

    def also_at(self, host: str) -> str:
        """Answer at another address, too. Its origin."""
        self._listeners.append(_Listener((host, 0), self))
        return "http://%s:%d" % self._listeners[-1].server_address[:2]

    def start(self) -> None:
        """Begin to answer."""
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop answering; every open connection ends."""
        self.closing.set()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
        if self.errors and error is None:
            raise AssertionError("the emulator itself failed:\n" + "\n".join(self.errors))

    def routes(self) -> list[Route]:
        """Every route there is."""
        raise NotImplementedError

    def authorize(self, request: Request) -> None:
        """Raise Refusal(401 or 403) for a request that may not."""
        raise NotImplementedError

    def error_body(self, status: int, message: str, path: str) -> Any:
        """How this plane words a refusal (of a request for this path)."""
        raise NotImplementedError

    def fault(
        self,
        kind: str,
        *,
        times: int = 1,
        method: str | None = None,
        path: str = "",
        status: int = 503,
        seconds: float = 1.0,
        retry_after: float | None = None,
        message: str = "injected by the test",
        done: bool = False,
    ) -> None:
        """Trouble for the next `times` requests with this method and a path that the pattern `path` is found in.

        status: answers `status` (with Retry-After, where given); slow: answers after `seconds`; reset: the connection
        breaks in the middle of the answer; drop: before it; hang: no answer ever. Except for slow, the request is not
        carried out, unless `done` is set: then it is, and only its answer is lost.
        """
        if kind not in FAULTS:
            raise ValueError(f"unknown fault {kind!r}: one of {', '.join(FAULTS)}")
        with self.lock:
            self._faults.append(Fault(kind, times, method, path, status, seconds, retry_after, message, done))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault for this request, counted down."""
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in (None, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def short(self, path: str) -> str:
        """A path without the base."""
        return path[len(self.base) :] if path.startswith(self.base + "/") else path

    def answer(self, request: Request) -> Reply:
        """Route, check, carry out."""
        try:
            return self._dispatch(request)
        except Refusal as refusal:
            body = self.error_body(refusal.status, refusal.message, request.path)
            return Reply(refusal.status, body, headers=refusal.headers)
        except Exception:
            self.errors.append(traceback.format_exc())
            return Reply(500, self.error_body(500, "the emulator itself failed: " + self.errors[-1], request.path))

    def _dispatch(self, request: Request) -> Reply:
        if len(request.body) > BODY_LIMIT:
            raise Refusal(413, f"Request entity too large: limit is {BODY_LIMIT}")
        found = [(route, route.match(request.path)) for route in self.routes()]
        here = [(route, params) for route, params in found if params is not None]
        if not here:
            raise Refusal(404, f"404 page not found: {request.path}")
        chosen = [(route, params) for route, params in here if route.method == request.method]
        if not chosen:
            allowed = ", ".join(sorted({route.method for route, _ in here}))
            raise Refusal(405, f"{request.method} is not allowed on {request.path}", {"Allow": allowed})
        route, request.params = chosen[0]
        if not route.public:
            self.authorize(request)
        for name in request.query:
            if name not in route.query:
                raise Refusal(400, f'unknown query parameter "{name}" on {request.path}')
        return route.handler(request)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, where: tuple[str, int], owner: HttpServer) -> None:
        self.owner = owner
        super().__init__(where, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.server.owner.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to standard error: `server.requests` is the log."""

    def serve(self) -> None:
        """One request."""
        owner = self.server.owner
        parts = urlsplit(self.path)
        path = owner.short(parts.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = parse_qs(parts.query, keep_blank_values=True)
        request = Request(self.command, path, query, dict(self.headers.items()), body)
        fault = owner.take_fault(self.command, path)
        if fault is None or fault.kind == "slow" or fault.done:
            if fault is not None and fault.kind == "slow":
                owner.closing.wait(fault.seconds)
            reply = owner.answer(request)
        else:
            reply = Reply(200, {})
        if fault is not None and fault.kind == "status":
            wait = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
            reply = Reply(fault.status, owner.error_body(fault.status, fault.message, path), headers=wait)
        broken = fault is not None and fault.kind in ("reset", "drop", "hang")
        owner.requests.append(Logged(self.command, path, 0 if broken else reply.status))
        if not broken:
            self.send(reply)
        elif fault is not None:
            self.fail(fault.kind, reply)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = serve

    def send(self, reply: Reply) -> None:
        """A whole answer."""
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.stream is not None:
            self.send_stream(reply.stream)
            return
        data = b"" if reply.body is None else json.dumps(reply.body).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_stream(self, stream: Iterator[bytes]) -> None:
        """Text in chunks, as it comes."""
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for block in stream:
            self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def fail(self, kind: str, reply: Reply) -> None:
        """Half an answer, or none, and a connection that breaks."""
        self.close_connection = True
        if kind == "hang":
            self.server.owner.closing.wait()
            return
        if kind == "reset":
            data = json.dumps(reply.body if reply.body is not None else {}).encode()
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(data) + 64))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        self.server.owner.connections.discard(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # without lingering this is a TCP reset, at once
