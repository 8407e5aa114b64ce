"""HTTP to the two clouds that ends in bounded time, and plain words for what a server says.

Every request has a timeout. What may be asked twice (GET, DELETE, PATCH, PUT) is retried after a broken connection, 429
or 5xx; a POST only where it cannot have been carried out: no connection, 429 or 503. A job that was created although
its answer got lost is looked for by its name, which is never used twice.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

import screen
from transport import Refusal

CONNECT_S, READ_S, LOG_READ_S = 5.0, 30.0, 300.0  # seconds; a log may be silent for a while
RETRIES, READ_RETRIES, BACKOFF_S, LONGEST_WAIT_S = 4, 2, 0.5, 10.0  # waits of 0, 1, 2 and 4 s, or what Retry-After says
ASKING = frozenset(("GET", "HEAD", "DELETE", "PATCH", "PUT"))  # may be asked twice


class Retry(urllib3.Retry):
    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        """Whether to ask again after this answer."""
        return status_code in ((429, 500, 502, 503, 504) if method in (self.allowed_methods or ()) else (429, 503))

    def get_retry_after(self, response: Any) -> float | None:
        """What Retry-After says, but never a wait that a person would take for a hang."""
        try:
            seconds = super().get_retry_after(response)
        except urllib3.exceptions.InvalidHeader:  # "0.5", say
            return None
        return None if seconds is None else min(seconds, LONGEST_WAIT_S)


class Adapter(HTTPAdapter):
    """Timeouts, retries and the private CA for every request of a session, whoever makes it: the Lepton SDK sets no
    timeout for logs, and REQUESTS_CA_BUNDLE would win over the session's own CA."""

    def __init__(self, ca_bundle: str | None, safe: frozenset[str] = ASKING) -> None:
        self.ca_bundle, self.safe = ca_bundle, safe
        super().__init__(pool_maxsize=64, max_retries=Retry(
            total=RETRIES, read=READ_RETRIES, other=0, redirect=0, backoff_factor=BACKOFF_S, allowed_methods=safe,
            raise_on_status=False))

    def send(self, request: Any, stream: bool = False, timeout: Any = None, verify: Any = True, cert: Any = None,
             proxies: Any = None) -> requests.Response:
        limits = (CONNECT_S, LOG_READ_S if stream else READ_S)
        for left in range(READ_RETRIES, -1, -1):
            with screen.step("%s %s" % (request.method, request.url)):
                response = super().send(request, stream, limits, self.ca_bundle or verify, cert, proxies)
            try:
                if stream or response.content is not None:  # read now: what breaks can be asked for again
                    break
            except requests.RequestException:
                if request.method not in self.safe or not left:
                    raise
        return response


def harden(session: requests.Session, ca_bundle: str | None) -> requests.Session:
    """Give a session timeouts, retries and a private CA. Raises Refusal if the CA's file is not there."""
    if ca_bundle and not os.path.exists(ca_bundle):
        raise Refusal("ca_bundle %s is not there" % ca_bundle, "name the PEM file of your certificate authority")
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry would be a warning
    for scheme in ("https://", "http://"):
        session.mount(scheme, Adapter(ca_bundle))
    return session


FORBIDDEN = "the credentials are known; ask for the right or the quota, or change what it names in the profile"
CREDENTIALS = {"Lepton": "renew LEPTON_WORKSPACE_TOKEN, or run `lep login` again",
               "run:AI": "check client_id and client_secret of this profile"}


def refused(platform: str, response: requests.Response, doing: str, secrets: Iterable[str] = ()) -> Refusal:
    """The Refusal for an answer of 400 and more: exit code 4 with the server's own reason, 3 for what is too big, 5 for
    a server in trouble. `secrets` are those that a server may have repeated."""
    reason = _reason(response)
    for secret in secrets:
        reason = reason.replace(secret, "***") if secret else reason
    code = response.status_code
    what = "%s: %s was answered %d: %s" % (platform, doing, code, reason[:300])
    if code == 401:
        return Refusal(what, CREDENTIALS[platform], 4, code)
    if code == 403:
        return Refusal(what, FORBIDDEN, 4, code)
    if code == 413 or "too large" in reason:
        return Refusal(what, "leave files out with exclude or .airliftignore", 3, code)
    if code == 429 or code >= 500:
        return Refusal(what, "the platform has trouble of its own; try again later", 5, code)
    return Refusal(what, "change what it names in the profile, then launch again", 4, code)


def _reason(response: requests.Response) -> str:
    """What the server says: the message of its JSON, else its text."""
    try:
        body = response.json()
        said = next(str(body[key]) for key in ("message", "detail", "error") if body.get(key))
    except (ValueError, AttributeError, StopIteration):
        said = response.text
    return " ".join(said.split()) or response.reason


def unreachable(platform: str, url: str, error: Exception, sent: str = "") -> Refusal:
    """The Refusal for no answer at all, exit code 5. `sent` names a job that the server may have got all the same."""
    kind, fix = "cannot be reached", "check the address, the proxy variables and the network"
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        kind = "did not answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        kind, fix = "is not trusted (TLS)", "name its certificate authority as ca_bundle in the profile"
    elif isinstance(error, (requests.exceptions.InvalidJSONError, RuntimeError)):
        kind, fix = "answers, but not as its API does", "check the address; a proxy or a login page may have answered"
    if sent and not isinstance(error, (requests.exceptions.SSLError, requests.ConnectTimeout)):
        fix = "look for %s in the console before you launch again: the request had been sent" % sent
    return Refusal("%s at %s %s" % (platform, re.sub(r"//[^/@]*@", "//", url), kind), fix, 5)
