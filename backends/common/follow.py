"""Following a job of a cloud: its states with elapsed time, the logs of some ranks, and how it ended."""

from __future__ import annotations

import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import requests
import urllib3

import screen
from backends import FINAL, Status, await_end, ended_already
from backends.common.podlog import BEGUN, ECHOES, first_failure, note
from runs import Run
from transport import Refusal

POLL_S, SLOWER_AFTER_S = 2.0, 120.0  # between two questions for the state; five times that for a job that takes long
PATIENCE_S = 600.0  # how long the platform of a job that is followed may be out of reach
QUIET_S, SO_FAR_S = 1.5, 20.0  # when a stream that follows its pod has given what there was
OTHERS_S = 30.0  # for reading the logs of all ranks after a failure
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
        self.codes: dict[str, int] = {}  # rank -> exit code, as its pod said it
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
            raise Refusal("there is no log of run %s: its pods never started, or are gone" % self.run.id,
                          "see python launch.py status " + self.run.id)
        if not found:
            raise Refusal("run %s has no log yet: it is %s (%s)" % (self.run.id, status.state, status.detail),
                          "python launch.py logs -f %s waits for it" % self.run.id)

    def explain(self, status: Status) -> Status:
        """A Status that is final, with the exit code that the pods told, or with what is known instead."""
        status = self.with_attempt(status, self.attempts)
        if status.state != "failed":
            return replace(status, exit_code=0 if status.state == "done" else None)
        silent = self._read_others()
        code = first_failure(self.codes)
        if code is not None and (code not in ECHOES or not silent):
            return Status("failed", status.detail, code)
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
                    fix = refusal.fix + "; the job goes on: python launch.py logs -f " + self.run.id
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
                          "end the job with: python launch.py cancel " + self.run.id, 4)

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
        note(self.codes, str(rank), line)
        if rank == self.ranks[0] and BEGUN.search(line):
            self.attempts += 1
            if self.attempts > 1:
                self._print("-- attempt %d of %d\n" % (self.attempts, self.run.starts))
        self._print(screen.rank(rank) + line if len(self.ranks) > 1 else line)

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
                    note(self.codes, str(rank), line)
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
        return ended_already(before.detail)
    stop()
    after = await_end(ask, min(POLL_S, 0.5))
    return what + (" was stopped" if after.state in FINAL else " was told to stop; it is still " + after.detail)
