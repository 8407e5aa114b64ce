"""What the two clouds share: HTTP that ends in bounded time, plain words for what a server says, and following a job.

Every request has a timeout. What may be asked twice (GET, DELETE, PATCH, PUT) is retried after a broken connection, 429
or 5xx; a POST only where it cannot have been carried out: no connection, 429 or 503. A job that was created although
its answer got lost is looked for by its name, which is never used twice.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from backends import ENDED_ALREADY, FINAL, Job, Run, Status, await_end, screen
from pod.failures import POD
from transport import LIMITS, Plan, Refusal, human

CONNECT_S, READ_S, LOG_READ_S = 5.0, 30.0, 300.0  # seconds; a log may be silent for a while
RETRIES, READ_RETRIES, BACKOFF_S, LONGEST_WAIT_S = 4, 2, 0.5, 10.0  # waits of 0, 1, 2 and 4 s, or what Retry-After says
POLL_S, SLOWER_AFTER_S = 2.0, 120.0  # between two questions for the state; five times that for a job that takes long
PATIENCE_S = 600.0  # how long the platform of a job that is followed may be out of reach
QUIET_S, SO_FAR_S = 1.5, 20.0  # when a stream that follows its pod has given what there was
OTHERS_S = 30.0  # for reading the logs of all ranks after a failure

ASKING = frozenset(("GET", "HEAD", "DELETE", "PATCH", "PUT"))  # may be asked twice


# ---------------------------------------------------------------- HTTP


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


def refused(platform: str, response: requests.Response, doing: str, hide: Iterable[str] = ()) -> Refusal:
    """The Refusal for an answer of 400 and more: exit code 4 with the server's own reason, 3 for what is too big, 5 for
    a server in trouble. `hide` are secrets that a server may have repeated."""
    reason = _reason(response)
    for secret in hide:
        reason = reason.replace(secret, "***") if secret else reason
    code = response.status_code
    what = "%s: %s was answered %d: %s" % (platform, doing, code, reason[:300])
    if code == 401:
        return Refusal(what, CREDENTIALS[platform], 4)
    if code == 403:
        return Refusal(what, FORBIDDEN, 4)
    if code == 413 or "too large" in reason:
        return Refusal(what, "leave files out with exclude or .airliftignore", 3)
    if code == 429 or code >= 500:
        return Refusal(what, "the platform is in trouble; try again later", 5)
    return Refusal(what, "change what it names in the profile, then launch again", 4)


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


# ---------------------------------------------------------------- following

ENDED = re.compile(r"airlift: rank (\S+) ended with exit code (\d+)")  # pod.py's last line
BEGUN = re.compile(r"airlift: rank \d+ of \d+, sha256 .*, begun ")  # its first, where the job may be retried
NOT_WHOLE = "airlift_pod_program_did_not_arrive_whole"  # transport.py's bootstrap
ECHOES = (137, 143)  # killed: what the other ranks say when a job ends because of one
IMAGE_TROUBLE = re.compile("ErrImagePull|ImagePullBackOff|InvalidImageName|[Ff]ailed to pull image|[Bb]ack-off pulling")
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, Refusal)


class Follower:
    """Follows one job: states with elapsed time, and the logs of some ranks, each read by a thread of its own.

    `ask()` gives the Status. `open_log(rank, follow)` yields text from the beginning: all there is, or on as it comes
    until the platform closes it; None instead means no log yet, a Refusal with code 4 that there is no way to it.
    `trouble()` tells what keeps the job's pods from starting, or "".
    """

    def __init__(self, run: Run, ask: Callable[[], Status], open_log: Callable[[int, bool], Iterator[str] | None],
                 trouble: Callable[[], str]) -> None:
        self.run, self.ask, self.open_log, self.trouble = run, ask, open_log, trouble
        self.ranks = run.ranks
        self.codes: dict[str, int] = {}  # rank, as pod.py says it -> exit code
        self.attempts = 0  # of the first rank that is shown, as its log tells
        self.ran = False  # all pods have been up at once
        self.heard = time.monotonic()  # when the platform last answered
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.mute = False

    def follow(self) -> Status:
        """To the end of the job. The Status has the exit code of the recipe where a pod told it. Raises Refusal (exit
        code 4) for an image that cannot be pulled, which some platforms try for ever."""
        readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in self.ranks]
        for reader in readers:
            reader.start()
        try:
            status = self._watch()
            self.over.set()
            deadline = time.monotonic() + 15
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
        finally:
            self.over.set()
            with self.lock:  # a thread that still reads must not stand in the middle of a write when Python ends
                self.mute = True
        return self.explain(status)

    def logs(self) -> None:
        """Print the logs that there are. Raises Refusal where there is none."""
        status, found = self.ask(), False
        for rank in self.ranks:
            for line in lines(self.open_log(rank, status.state in FINAL) or ()):
                found = True
                self._show(rank, line)
        if not found and status.state in FINAL:
            raise Refusal("there is no log of run %s: its pods never started, or are gone" % self.run.run,
                          "see python launch.py status " + self.run.run)
        if not found:
            raise Refusal("run %s has no log yet: it is %s (%s)" % (self.run.run, status.state, status.detail),
                          "python launch.py logs -f %s waits for it" % self.run.run)

    def explain(self, status: Status) -> Status:
        """A Status that is final, with the exit code that the pods told, or with what is known instead."""
        status = self.with_attempt(status, self.attempts)
        if status.state != "failed":
            return Status(status.state, status.detail, 0 if status.state == "done" else None)
        silent = self._read_others()
        codes = [code for _, code in sorted(self.codes.items()) if code]
        told = [code for code in codes if code not in ECHOES]
        if told or (codes and not silent):
            return Status("failed", status.detail, (told or codes)[0])
        quiet = "rank %s ended without a word" % ", ".join(map(str, silent)) if silent else ""
        return Status("failed", "; ".join(filter(None, (status.detail, quiet, self._trouble()))))

    def with_attempt(self, status: Status, number: int) -> Status:
        """The Status with what is known of retries."""
        said = "attempt %d of %d" % (number, self.run.starts) if number > 1 else ""
        return replace(status, detail=", ".join(filter(None, (status.detail, said))))

    def _watch(self) -> Status:
        last, warned, begun = None, False, time.monotonic()
        while True:
            try:
                status = self.ask()
                self.heard, warned = time.monotonic(), False
            except Refusal as refusal:
                if refusal.code != 5 or time.monotonic() - self.heard > PATIENCE_S:
                    fix = refusal.fix + "; the job goes on: python launch.py logs -f " + self.run.run
                    raise Refusal(refusal.what, fix, refusal.code) from None
                if not warned:
                    self._print("-- %s; trying again for %.0f minutes\n" % (refusal.what, PATIENCE_S / 60))
                warned = True
            else:
                if status.state == "running":
                    self.run.seen_running()
                if status != last:
                    self._print(screen.told(status, self.run) + "\n")
                last = status
                self.ran = self.ran or status.state in ("running", "done")
                if status.state in ("waiting", "failed") and not self.ran and not self.codes:
                    self._check_image()
                if status.state in FINAL:
                    return status
            slower = 5 if time.monotonic() - begun > SLOWER_AFTER_S else 1  # an answer holds all the chunks
            time.sleep(slower * POLL_S)

    def _check_image(self) -> None:
        trouble = self._trouble()
        if IMAGE_TROUBLE.search(trouble):
            raise Refusal("the image cannot be pulled: " + trouble[:300], "mend container_image or the pull secrets; "
                          "end the job with: python launch.py cancel " + self.run.run, 4)

    def _trouble(self) -> str:
        try:
            return self.trouble()
        except BROKEN:  # not every installation tells, and the state matters more
            return ""

    def _read(self, rank: int) -> None:
        """Show a log to its end. A stream that breaks is opened again, and what was shown is passed over, unless its
        first line tells that it is the log of another start."""
        shown, first, last_round, why = 0, "", False, "the platform gave none"
        while not last_round:
            last_round = self.over.is_set()
            try:
                for number, line in enumerate(lines(self.open_log(rank, True) or ()), 1):
                    if number == 1 and line != first:
                        shown, first = 0, line
                    if number > shown:
                        shown = number
                        self._show(rank, line)
            except Refusal as refusal:
                why = refusal.what + "; " + refusal.fix
                if refusal.code == 4 and self.ran:  # before that, its pod may just not be there yet
                    break
            except BROKEN:
                pass  # whether the platform can be reached at all is told by ask()
            if not last_round:
                self.over.wait(POLL_S)
        if not shown:
            self._print("-- no log of rank %d: %s\n" % (rank, why))

    def _show(self, rank: int, line: str) -> None:
        self._note(line)
        if rank == self.ranks[0] and BEGUN.search(line):
            self.attempts += 1
            if self.attempts > 1:
                self._print("-- attempt %d of %d\n" % (self.attempts, self.run.starts))
        self._print(screen.rank(rank) + line if len(self.ranks) > 1 else line)

    def _note(self, line: str) -> None:
        found = ENDED.search(line)
        if found:
            self.codes[found.group(1)] = int(found.group(2))
        elif line.startswith(NOT_WHOLE):
            self.codes["?"] = POD

    def _print(self, text: str) -> None:
        with self.lock:
            if not self.mute:
                sys.stdout.write(text)
                sys.stdout.flush()

    def _read_others(self) -> list[int]:
        """Note what the logs that were not shown tell of the end. The ranks whose log is there but tells nothing."""
        silent = []
        deadline = time.monotonic() + OTHERS_S
        for rank in range(self.run.nodes):
            if str(rank) in self.codes or time.monotonic() > deadline:
                continue
            try:
                log = self.open_log(rank, True)
                for line in lines(log or ()):
                    self._note(line)
                    if time.monotonic() > deadline:
                        break
            except BROKEN:
                continue
            if log is not None and str(rank) not in self.codes:
                silent.append(rank)
        return silent


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """Whole lines, with their ends, from text in pieces; a last line without an end gets one."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line + "\n"
    if rest:
        yield rest + "\n"


def so_far(pieces: Iterator[str]) -> Iterator[str]:
    """What a stream gives that follows its pod and has no other form: all that comes until it is quiet for QUIET_S, or
    SO_FAR_S are over."""
    came: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for piece in pieces:
                came.put(piece)
            came.put(None)
        except BROKEN as error:
            came.put(error)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + SO_FAR_S
    while time.monotonic() < deadline:
        try:
            piece = came.get(timeout=QUIET_S)
        except queue.Empty:
            return
        if isinstance(piece, Exception):
            raise piece
        if piece is None:
            return
        yield piece


def cancel(what: str, ask: Callable[[], Status], stop: Callable[[], object]) -> str:
    """Stop a job that has not ended yet, and wait for its end, a minute at most. One sentence: what was done."""
    before = ask()
    if before.state in FINAL:
        return ENDED_ALREADY % before.detail
    stop()
    after = await_end(ask, min(POLL_S, 0.5))
    return what + (" was stopped" if after.state in FINAL else " was told to stop; it is still " + after.detail)


def require_object(what: str, size: int, executor: str, also: str = "") -> None:
    """Raises Refusal (exit code 3) for an API object that is too big; `also` names what may be smaller, too."""
    limit = LIMITS[executor].object
    if size > limit:
        raise Refusal("the %s's API object is %s of %s; nothing was submitted" % (what, human(size), human(limit)),
                      "leave files out with exclude" + also, 3)


def sent_by_value(job: Job, plan: Plan) -> tuple[str, ...]:
    """The secrets that a server may repeat, since it is given them."""
    return tuple(plan.env[name] for name, source in job.secrets.items() if source == "env")


# ---------------------------------------------------------------- requests


def job_name(recipe: str, run: str, longest: int) -> str:
    """A name for the platform: lower case, letters, digits and dashes, a letter first, ending in our run id."""
    stem = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    stem = stem if re.match(r"[a-z]", stem) else "job-" + stem
    return stem[: longest - len(run) - 1].rstrip("-") + "-" + run


def with_custom(spec: dict[str, Any], custom: Mapping[str, Any], ours: tuple[str, ...], where: str = "") -> Any:
    """`spec` with custom_spec over it: tables deeply, lists of variables added to ours, everything else replaced.
    Raises Refusal for a field in `ours` (dotted names), without which the job could not start."""
    merged = dict(spec)
    for key, value in custom.items():
        here = merged.get(key)
        if where + key in ours:
            raise Refusal("custom_spec sets %s, which Airlift sets itself" % (where + key), "take it out")
        if isinstance(here, dict) and isinstance(value, dict):
            merged[key] = with_custom(here, value, ours, where + key + ".")
        elif key in ("envs", "environmentVariables") and isinstance(value, list):
            merged[key] = here + value if here else value
        else:
            merged[key] = value
    return merged
