"""HTTP to the two clouds: requests that end in bounded time, and errors in plain English.

Every request has a timeout. GET, DELETE, PATCH and PUT may be repeated, and are retried after a broken connection, 429
or 5xx; a POST only if it cannot have been carried out: no connection, 429 or 503. If the answer to the creation of a
job was lost, the job is looked up by its name, which is never used twice.

A server is not trusted beyond its role: what is sent to it goes to no other origin, and what it sends has bounds.
"""

import codecs
import http.client
import io
import logging
import math
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

import screen
from transport import Refusal

CONNECT_S, READ_S, LOG_READ_S = 5.0, 30.0, 300.0  # seconds; a log may be silent for a while
RETRIES, READ_RETRIES, BACKOFF_S, LONGEST_WAIT_S = 4, 2, 0.5, 10.0  # waits of 0, 1, 2 and 4 s, or Retry-After's
REPEATABLE = frozenset(("GET", "HEAD", "DELETE", "PATCH", "PUT"))
MOST = 64 << 20  # bytes of one answer: the largest, Ray's whole log, is read again every few seconds
ANSWER_S = 120.0  # seconds for one answer that is not a log: 1.5 MiB of chunks at 13 KB/s
LINE, LINES = 65_536, 1_000  # bytes of one line of a head, as in http.client, and such lines in a row; it allows 100
PIECE = 65_536  # bytes of a log in one piece, at most


class Retry(urllib3.Retry):
    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        """Whether to repeat the request after this answer."""
        return status_code in ((429, 500, 502, 503, 504) if method in (self.allowed_methods or ()) else (429, 503))

    def get_retry_after(self, response: Any) -> float | None:
        """The server's Retry-After, but never a wait that looks like a hang."""
        try:
            seconds = super().get_retry_after(response)
        except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):  # "0.5", say, or 5,000 digits
            return None
        return None if seconds is None else min(seconds, LONGEST_WAIT_S)


ASKED = threading.local()  # by a thread's present request: `origin`, and whether its answer is a log (`stream`)


class Wire(io.RawIOBase):
    """What a server sends, with bounds on bytes and time."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw, self.origin, self.left, self.until = raw, ASKED.origin, MOST, time.monotonic() + ANSWER_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise endless(self.origin, TOO_MUCH)
        if time.monotonic() > self.until:
            raise endless(self.origin, "has not sent its whole answer after %.0f s" % ANSWER_S)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class Reader(io.BufferedReader):
    """Lines and blocks of an answer. Those of a log are bounded one by one, since a log may be of any length."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self.wire, self.lines = wire, 0

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(LINE + 1 if size is None or size < 0 else size)
        self.lines += 1
        if len(line) > LINE or self.lines > LINES:
            raise endless(self.wire.origin, "sends a head without end")
        return line

    def read(self, size: int | None = -1) -> bytes:
        self.lines = 0
        if self.wire.until == math.inf:
            self.wire.left = MOST
        if size and size > MOST:  # it would be allocated at once
            raise endless(self.wire.origin, TOO_MUCH)
        return super().read(size)


class Answer(http.client.HTTPResponse):
    """An answer with bounds, in place of http.client's. Nothing is decompressed: 1 MB may hold 1 GB, or more."""

    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.wire = Wire(self.fp.detach())
        self.fp = Reader(self.wire)

    def begin(self) -> None:
        super().begin()
        if (self.getheader("Content-Encoding") or "identity").lower() != "identity":
            raise endless(self.wire.origin, COMPRESSED)
        if ASKED.stream and self.status < 300:
            self.wire.until = math.inf


TOO_MUCH = "sends more than %d MiB in one answer" % (MOST >> 20)
COMPRESSED = "sends compressed data, which was not asked for"


def endless(origin: str, does: str) -> Refusal:
    """The Refusal for an answer beyond its bounds."""
    return Refusal("%s %s" % (origin, does), "check the address; something else than the platform may have answered", 4)


def bounded(manager: Any) -> Any:
    """The pool manager, with connections whose answers have bounds."""
    manager.pool_classes_by_scheme = {scheme: type(pool.__name__, (pool,), {"ConnectionCls": type(
        pool.ConnectionCls.__name__, (pool.ConnectionCls,), {"response_class": Answer})})
        for scheme, pool in manager.pool_classes_by_scheme.items()}
    return manager


class Adapter(HTTPAdapter):
    """Timeouts, retries, bounds and the private CA for every request of a session, also those of the Lepton SDK, which
    sets no timeout for logs. (REQUESTS_CA_BUNDLE would win over the session's own CA.)"""

    def __init__(self, ca_bundle: str | None, repeatable: frozenset[str] = REPEATABLE) -> None:
        self.ca_bundle, self.repeatable = ca_bundle, repeatable
        super().__init__(pool_maxsize=64, max_retries=Retry(
            total=RETRIES, read=READ_RETRIES, other=0, redirect=0, backoff_factor=BACKOFF_S,
            allowed_methods=repeatable, raise_on_status=False))
        bounded(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        made = proxy not in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **options)
        return bounded(manager) if made else manager

    def send(self, request: Any, stream: bool = False, timeout: Any = None, verify: Any = True, cert: Any = None,
             proxies: Any = None) -> requests.Response:
        limits = (CONNECT_S, LOG_READ_S if stream else READ_S)
        ASKED.origin, ASKED.stream = origin(request.url), stream
        for left in range(READ_RETRIES, -1, -1):
            with screen.step("%s %s" % (request.method, request.url)):
                response = super().send(request, stream, limits, self.ca_bundle or verify, cert, proxies)
            response.encoding = "utf-8"  # not what the server says, nor a guess, which takes minutes for a large answer
            try:
                if stream or response.content is not None:  # read it now, so that it can be repeated if it breaks
                    break
            except requests.RequestException:
                if request.method not in self.repeatable or not left:
                    raise
        return response


def harden(session: requests.Session, ca_bundle: str | None) -> requests.Session:
    """Give a session timeouts, retries and a private CA. Raises Refusal if the CA's file does not exist."""
    if ca_bundle and not os.path.exists(ca_bundle):
        raise Refusal("ca_bundle %s does not exist" % ca_bundle, "name the PEM file of your certificate authority")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry would be a warning
    for scheme in ("https://", "http://"):
        session.mount(scheme, Adapter(ca_bundle))
    session.headers["Accept-Encoding"] = "identity"
    return confined(session)


def confined(session: requests.Session) -> requests.Session:
    """The session, which follows redirects only within an origin, and takes no credentials from ~/.netrc: requests
    would send those of a `default` entry there to any host, in place of the token."""
    session.auth = lambda request: request
    session.rebuild_auth = require_same_origin  # type: ignore[method-assign]  # requests calls it for each redirect
    return session


def require_same_origin(request: Any, response: requests.Response) -> None:
    here, there = origin(response.url), origin(request.url)
    if here != there:
        raise Refusal("%s redirects to another server, %s, which would get what was sent" % (here, there[:200]),
                      "if the platform has moved, put its new address where the old one is set", 4)


def origin(url: str) -> str:
    """Scheme, host and port of a URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return "%s://%s%s" % (parts.scheme, parts.hostname, ":%d" % port if port else "")
    except ValueError:
        return repr(url)


CREDENTIALS = {"Lepton": "renew LEPTON_WORKSPACE_TOKEN, or run `lep login` again",
               "run:AI": "check client_id and client_secret of this profile"}


def created(create: Callable[[], str], find: Callable[[], str | None]) -> str:
    """The id that `create` returns. If its answer was lost, or it was repeated (409), `find` looks the job up."""
    try:
        return create()
    except Refusal as refusal:
        found = None
        if refusal.code == 5 or refusal.http == 409:
            try:
                found = find()
            except Exception:  # noqa: S110 - the first error is the one to report
                pass
        if not found:
            raise
        return found


def decoded(response: requests.Response) -> Iterator[str]:
    """The text of a stream, as it comes."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return (decode(piece) for piece in response.iter_content(PIECE))


def refused(platform: str, response: requests.Response, doing: str, secrets: Iterable[str] = ()) -> Refusal:
    """The Refusal for an answer of 400 or more, with the server's reason: exit code 4, 3 for what is too big, 5 for a
    server in trouble. `secrets` are those that the server may have repeated."""
    reason = _reason(response)
    for secret in secrets:
        reason = reason.replace(secret, "***") if secret else reason
    code = response.status_code
    what = "%s: cannot %s: HTTP %d: %s" % (platform, doing, code, screen.said(reason or response.reason))
    fix, exit_code = "change what it names in the profile, then launch again", 4
    if code == 401:
        fix = CREDENTIALS[platform]
    elif code == 403:
        fix = "the credentials are valid; request the permission or quota, or change what it names in the profile"
    elif code == 413 or "too large" in reason:
        fix, exit_code = "leave files out with exclude or .airliftignore", 3
    elif code == 429 or code >= 500:
        fix, exit_code = "the platform has a problem of its own; try again later", 5
    return Refusal(what, fix, exit_code, code)


def _reason(response: requests.Response) -> str:
    """The server's reason: the message of its JSON, else its text."""
    try:
        body = response.json()
        reason = next(str(body[key]) for key in ("message", "detail", "error") if body.get(key))
    except (ValueError, AttributeError, StopIteration, RecursionError):
        reason = response.text
    return reason


def unreachable(platform: str, url: str, error: Exception, sent: str = "") -> Refusal:
    """The Refusal for no answer, exit code 5. `sent` names a job that may have been created all the same."""
    kind, fix = "cannot be reached", "check the address, the proxy variables and the network"
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        kind = "did not answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        kind, fix = "is not trusted (TLS)", "set ca_bundle in the profile to its certificate authority's file"
    elif isinstance(error, (requests.exceptions.InvalidJSONError, RuntimeError)):
        kind, fix = "does not answer as its API does", "check the address; a proxy or a login page may have answered"
    if sent and not isinstance(error, (requests.exceptions.SSLError, requests.ConnectTimeout)):
        fix = "the request may have arrived: look for %s in the console before you launch again" % sent
    return Refusal("%s at %s %s" % (platform, re.sub(r"//[^/@]*@", "//", url), kind), fix, 5)
