"""What the two clouds share: HTTP that ends in bounded time, plain words for what a server says, and following a job.

Every request has a timeout. What may be asked twice (GET, DELETE, PATCH, PUT) is retried after a broken connection, 429
or 5xx; a POST that creates a job only where it cannot have been carried out: no connection, 429 or 503.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from backends import Run, Status
from transport import Refusal

CONNECT_S, READ_S = 5.0, 30.0  # seconds
RETRIES, BACKOFF_S, LONGEST_WAIT_S = 4, 0.5, 10.0  # waits of 0, 1, 2 and 4 s, or what Retry-After says
POLL_S = 2.0  # seconds between two questions for the state


class Retry(urllib3.Retry):
    def get_retry_after(self, response: Any) -> float | None:
        """What Retry-After says, but never a wait that a person would take for a hang."""
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, LONGEST_WAIT_S)


class Adapter(HTTPAdapter):
    """Timeouts and retries for every request of a session, whoever makes it (the Lepton SDK sets none for logs)."""

    def send(self, request: Any, stream: bool = False, timeout: Any = None, verify: Any = True, cert: Any = None,
             proxies: Any = None) -> requests.Response:
        creating = request.method == "POST"
        self.max_retries = Retry(
            total=RETRIES, read=0 if creating else RETRIES, other=0, redirect=0, backoff_factor=BACKOFF_S,
            status_forcelist=(429, 503) if creating else (429, 500, 502, 503, 504), allowed_methods=None,
            raise_on_status=False)
        return super().send(request, stream, (CONNECT_S, READ_S), verify, cert, proxies)


def session(ca_bundle: str | None) -> requests.Session:
    """A session with timeouts, retries, the usual proxy variables, and a private CA if the profile names one."""
    made = requests.Session()
    harden(made, ca_bundle)
    return made


def harden(made: requests.Session, ca_bundle: str | None) -> None:
    for scheme in ("https://", "http://"):
        made.mount(scheme, Adapter())
    if ca_bundle:
        made.verify = ca_bundle


def refused(platform: str, response: requests.Response, doing: str, secret: str = "") -> Refusal:
    """The Refusal for an answer of 400 and more: exit code 4 with the server's own reason, 5 for a server in trouble."""
    reason = " ".join(response.text.split())[:300] or response.reason
    if secret:
        reason = reason.replace(secret, "***")
    what = "%s: %s was answered %d: %s" % (platform, doing, response.status_code, reason)
    if response.status_code in (401, 403):
        return Refusal(what, "check the credentials of this profile and what they may do", 4)
    if response.status_code == 429 or response.status_code >= 500:
        return Refusal(what, "the platform is in trouble; launch again later", 5)
    return Refusal(what, "change what it names in the profile, then launch again", 4)


def unreachable(platform: str, url: str, error: Exception, sent: str = "") -> Refusal:
    """The Refusal for no answer at all, exit code 5. `sent` names a job that the server may have got all the same."""
    kind = "did not answer in time" if isinstance(error, requests.Timeout) else "cannot be reached"
    if isinstance(error, requests.exceptions.SSLError):
        kind = "is not trusted (TLS)"
    fix = "check the address, the proxy variables and the network"
    if kind.startswith("is not"):
        fix = "name its certificate authority as ca_bundle in the profile"
    elif sent:
        fix = "the request had been sent: look for %s in the console before you launch again" % sent
    return Refusal("%s at %s %s" % (platform, re.sub(r"//[^/@]*@", "//", url), kind), fix, 5)


# ---------------------------------------------------------------- following

ENDED = re.compile(r"airlift: rank (\S+) ended with exit code (\d+)")  # pod.py's last line
IMAGE_TROUBLE = re.compile(r"ErrImagePull|ImagePullBackOff|InvalidImageName|[Ff]ailed to pull image|[Bb]ack-off pulling image")
FINAL = ("done", "failed", "cancelled")
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, Refusal)


class Follower:
    """Follows one job: states with elapsed time, and the logs of some ranks, each read by a thread of its own.

    `ask()` gives the Status. `open_log(rank)` yields text as it comes, from the beginning, and ends when the platform
    closes it; None instead means that there is no log yet, a Refusal with code 4 that there will be none. `trouble()`
    tells what keeps the job's pods from starting, or "".
    """

    def __init__(self, run: Run, ask: Callable[[], Status], open_log: Callable[[int], Iterator[str] | None],
                 trouble: Callable[[], str]) -> None:
        self.run, self.ask, self.open_log, self.trouble = run, ask, open_log, trouble
        self.ranks = ranks(run)
        self.codes: dict[str, int] = {}  # rank, as pod.py says it -> exit code
        self.over = threading.Event()
        self.lock = threading.Lock()

    def follow(self) -> Status:
        """To the end of the job. The Status has the exit code of the recipe where a pod told it. Raises Refusal (exit
        code 4) for an image that cannot be pulled, which some platforms try for ever."""
        readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in self.ranks]
        for reader in readers:
            reader.start()
        last = ""
        while True:
            status = self.ask()
            word = "%s (%s)" % (status.state, status.detail) if status.detail else status.state
            if word != last:
                self._print("-- %s after %.0f s\n" % (word, time.time() - self.run.started))
                last = word
            if status.state in ("waiting", "failed"):
                self._check_image()
            if status.state in FINAL:
                break
            time.sleep(POLL_S)
        self.over.set()
        for reader in readers:
            reader.join(15)
        return Status(status.state, status.detail, 0 if status.state == "done" else self._exit_code())

    def _check_image(self) -> None:
        trouble = self.trouble()
        if IMAGE_TROUBLE.search(trouble):
            raise Refusal("the image cannot be pulled: " + trouble[:300],
                          "mend container_image or the pull secrets; end the job with: python launch.py cancel " + self.run.run, 4)

    def _read(self, rank: int) -> None:
        """Show a log to its end. A stream that breaks is opened again, and what was shown is passed over."""
        shown, last_round = 0, False
        while not last_round:
            last_round = self.over.is_set()
            try:
                for number, line in enumerate(lines(self.open_log(rank) or ()), 1):
                    if number > shown:
                        shown = number
                        self._show(rank, line)
            except Refusal as refusal:
                if refusal.code == 4:  # asking again would not help
                    self._print("-- no log of rank %d: %s; %s\n" % (rank, refusal.what, refusal.fix))
                    return
            except BROKEN:
                pass  # whether the platform can be reached at all is told by ask()
            if not last_round:
                self.over.wait(POLL_S)

    def _show(self, rank: int, line: str) -> None:
        self._note(line)
        self._print("[%d] %s" % (rank, line) if len(self.ranks) > 1 else line)

    def _note(self, line: str) -> None:
        found = ENDED.search(line)
        if found:
            self.codes[found.group(1)] = int(found.group(2))

    def _print(self, text: str) -> None:
        with self.lock:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _exit_code(self) -> int | None:
        """The first failure that is not an echo of another's end, from the logs of all ranks; None if none tells it."""
        for rank in set(range(self.run.nodes)) - set(self.ranks):
            try:
                for line in lines(self.open_log(rank) or ()):
                    self._note(line)
            except BROKEN:
                continue
        failures = [code for _, code in sorted(self.codes.items()) if code]
        return next((code for code in failures if code not in (137, 143)), failures[0] if failures else None)


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """Whole lines, with their ends, from text in pieces; a last line without an end gets one."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line + "\n"
    if rest:
        yield rest + "\n"


def print_logs(run: Run, open_log: Callable[[int], Iterator[str] | None]) -> None:
    """Print the logs there are, of rank 0 or of all. Raises Refusal where there is none."""
    found = False
    for rank in ranks(run):
        for line in lines(open_log(rank) or ()):
            found = True
            sys.stdout.write("[%d] %s" % (rank, line) if len(ranks(run)) > 1 else line)
    if not found:
        raise Refusal("run %s has no log yet" % run.run, "see python launch.py status " + run.run)


def ranks(run: Run) -> list[int]:
    return list(range(run.nodes)) if run.record.get("all_ranks") else [0]


def await_end(ask: Callable[[], Status], seconds: float = 60.0) -> Status:
    """The Status once the job has ended, or as it is after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        status = ask()
        if status.state in FINAL or time.monotonic() > deadline:
            return status
        time.sleep(min(POLL_S, 0.5))


def job_name(recipe: str, run: str, longest: int) -> str:
    """A name for the platform: lower case, letters, digits and dashes, a letter first, ending in our run id."""
    stem = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")
    stem = stem if re.match(r"[a-z]", stem) else "job-" + stem
    return stem[: longest - len(run) - 1].rstrip("-") + "-" + run
