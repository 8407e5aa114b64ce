"""Following a job on a cloud: its states with elapsed time, the logs of some ranks, and how it ended."""

import array
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
from backends import FINAL, Status
from backends.common.ends import BEGUN, ECHOES, Ends
from runs import Run
from transport import Refusal

POLL_S, SLOWER_AFTER_S = 2.0, 120.0  # seconds between two requests for the state; five times that for a long job
PATIENCE_S = 600.0  # how long the platform may be out of reach while a job is followed
QUIET_S, SO_FAR_S = 1.5, 20.0  # a log that never ends has been read after that silence, or that time
LONGEST = 1 << 20  # characters of a line that are kept until its end comes; a longer one is passed on in parts
AT_ONCE = 256  # logs that are shown at most: each is a thread and a connection
OTHERS_S = 30.0  # for reading the logs of all ranks after a failure
IMAGE_TROUBLE = re.compile("ErrImagePull|ImagePullBackOff|InvalidImageName|[Ff]ailed to pull image|[Bb]ack-off pulling")
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, Refusal)


class Follower:
    """Follows one job: its states with elapsed time, and the logs of some ranks, each read by its own thread.

    `ask()` returns the Status. `open_log(rank, follow)` yields text from the beginning: the log so far, or as it grows
    until the platform closes it; None means that there is no log yet, a Refusal with code 4 that there is no access.
    `trouble()` returns what keeps the job's pods from starting, or "".
    """

    def __init__(self, run: Run, ask: Callable[[], Status], open_log: Callable[[int, bool], Iterator[str] | None],
                 trouble: Callable[[], str]) -> None:
        self.run, self.ask, self.open_log, self.trouble = run, ask, open_log, trouble
        self.ends = Ends()
        self.attempts = 0  # starts of the first rank that is shown, by its log
        self.ran = False  # all pods have been up at the same time
        self.heard = time.monotonic()  # when the platform last answered
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.mute = False

    def follow(self) -> Status:
        """To the end of the job. Raises Refusal for an image that cannot be pulled: some platforms retry for ever."""
        readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in self._shown()]
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
            with self.lock:  # a thread that still reads must not be in the middle of a write when Python ends
                self.mute = True
        return self.explain(status)

    def status(self) -> Status:
        status = self.ask()
        return self.explain(reasoned(status, self._trouble() if status.state == "waiting" else ""))

    def logs(self) -> None:
        """Print the logs so far. Raises Refusal if there are none."""
        status, found = self.ask(), False
        for rank in self._shown():
            for line in lines(self.open_log(rank, status.state in FINAL) or ()):
                found = True
                self._show(rank, line)
        if not found and status.state in FINAL:
            raise Refusal("there is no log of run %s: its pods never started, or are gone" % self.run.id,
                          "see python launch.py status " + self.run.id)
        if not found:
            raise Refusal("run %s has no log yet: it is %s (%s)" % (self.run.id, status.state, status.detail),
                          "python launch.py logs -f %s waits for it" % self.run.id)

    def _shown(self) -> list[int]:
        ranks = self.run.ranks
        if len(ranks) > AT_ONCE:
            self._say("of %d logs, the first %d are shown; --rank N shows another" % (len(ranks), AT_ONCE))
        return ranks[:AT_ONCE]

    def explain(self, status: Status) -> Status:
        """The Status with the exit code that the pods printed, or else with what is known about the failure."""
        status = self.with_attempt(status, self.attempts)
        if status.state != "failed":
            return replace(status, exit_code=0 if status.state == "done" else None)
        silent, unread = self._read_others()
        code = self.ends.code()
        if code is not None and (code not in ECHOES or not (silent or unread)):
            return replace(status, exit_code=code, why=self.ends.said())
        no_code = "rank %s ended without an exit code in its log" % ", ".join(map(str, silent)) if silent else ""
        no_log = "the logs of %d other ranks could not be read" % unread if code is not None and unread else ""
        return replace(status, detail="; ".join(filter(None, (status.detail, no_code, no_log, self._trouble()))))

    def with_attempt(self, status: Status, number: int) -> Status:
        """The Status with the number of the attempt, if it is not the first."""
        attempt = "attempt %d of %d" % (number, self.run.starts) if number > 1 else ""
        return replace(status, detail=", ".join(filter(None, (status.detail, attempt))))

    def _watch(self) -> Status:
        last, warned, begun = ("", "", ""), False, time.monotonic()
        while True:
            try:
                status = self.ask()
                self.heard, warned = time.monotonic(), False
            except Refusal as refusal:
                if refusal.code != 5 or time.monotonic() - self.heard > PATIENCE_S:
                    fix = refusal.fix + "; the job goes on: python launch.py logs -f " + self.run.id
                    raise Refusal(refusal.what, fix, refusal.code) from None
                if not warned:
                    self._say("%s; trying again for %.0f minutes" % (refusal.what, PATIENCE_S / 60))
                warned = True
            else:
                if status.state == "running":
                    self.run.running_since = self.run.running_since or time.time()
                self.ran = self.ran or status.state in ("running", "done")
                trouble = ""
                if status.state in ("waiting", "failed") and not self.ran and not self.ends.codes:
                    trouble = self._trouble()
                said = status.state, status.detail, re.sub("[0-9]+", "", trouble)  # its counts may change often
                if said != last:
                    self._print(screen.status_line(reasoned(status, trouble), self.run) + "\n")
                last = said
                if IMAGE_TROUBLE.search(trouble):
                    raise Refusal("the image cannot be pulled: " + trouble, "correct container_image or the pull "
                                  "secrets; end the job with: python launch.py cancel " + self.run.id, 4)
                if status.state in FINAL:
                    return status
            slower = 5 if time.monotonic() - begun > SLOWER_AFTER_S else 1  # each answer contains all the chunks
            time.sleep(slower * POLL_S)

    def _trouble(self) -> str:
        try:
            return screen.said(self.trouble())
        except BROKEN:  # not every installation has events, and the state matters more
            return ""

    def _read(self, rank: int) -> None:
        """Show a log to its end. A stream that breaks is opened again; what was shown is skipped, see unseen()."""
        shown, last_round, why = array.array("q"), False, "the platform gave none"
        while not last_round:
            last_round = self.over.is_set()
            try:
                for line in unseen(lines(self.open_log(rank, True) or ()), shown):
                    self._show(rank, line)
            except Refusal as refusal:
                why = refusal.what + "; " + refusal.fix
                if refusal.code == 4 and self.ran:  # before that, its pod may not exist yet
                    if shown:
                        self._say("the log of rank %d ends here: %s" % (rank, why))
                    break
            except BROKEN:
                pass  # if the platform cannot be reached, ask() reports it
            if not last_round:
                self.over.wait(POLL_S)
        if not shown:
            self._say("no log of rank %d: %s" % (rank, why))

    def _show(self, rank: int, line: str) -> None:
        self.ends.note(rank, line)
        if rank == self.run.ranks[0] and BEGUN.search(line):
            self.attempts += 1
            if self.attempts > 1:
                self._say("attempt %d of %d" % (self.attempts, self.run.starts))
        self._print(screen.rank(rank) + line.rstrip("\n") + "\n" if len(self.run.ranks) > 1 else line)

    def _say(self, text: str) -> None:
        """A line of our own."""
        self._print("-- %s\n" % screen.plain(text)[:screen.LONGEST])

    def _print(self, text: str) -> None:
        with self.lock:
            if not self.mute:
                sys.stdout.write(text)
                sys.stdout.flush()

    def _read_others(self) -> tuple[list[int], int]:
        """Collect exit codes from the logs that were not shown. Returns the ranks whose log has none, and the number of
        those whose log could not be read, or not in time."""
        silent, unread = list[int](), 0
        deadline = time.monotonic() + OTHERS_S
        for rank in range(self.run.nodes):
            if rank in self.ends.codes:
                continue
            if time.monotonic() > deadline:
                unread += 1
                continue
            try:
                log = self.open_log(rank, True)
                for line in lines(log or ()):
                    self.ends.note(rank, line)
                    if time.monotonic() > deadline:
                        break
            except BROKEN:
                log = None
            if log is None:
                unread += 1
            elif rank not in self.ends.codes:
                silent.append(rank)
        return silent, unread


def unseen(came: Iterable[str], shown: "array.array[int]") -> Iterator[str]:
    """The lines that do not repeat the end of what was shown; `shown` has their hashes, and gets those of the new ones.
    A stream that is opened again may begin anew, or, where the node has cut the log meanwhile, at any later line; where
    it begins with what was never shown, it is the log of another start, or lines between were cut. Lines that may be
    repetitions are held until that is certain."""
    held: list[str] = []
    starts: Iterable[int] = range(len(shown))  # places in `shown` where what has come so far may have begun
    new = 0  # how many lines of `held` repeat its end, by a place that has come to it
    for line in came:
        at, number = hash(line), len(held)
        if any(start + number == len(shown) for start in starts):
            new = number
        starts = [start for start in starts if start + number < len(shown) and shown[start + number] == at]
        held.append(line)
        if starts:
            continue
        for fresh in held[new:]:
            shown.append(hash(fresh))
            yield fresh
        held, new = [], 0


def reasoned(status: Status, why: str) -> Status:
    """The Status, of a job that waits with what it waits for."""
    waits = status.state == "waiting"
    return replace(status, detail=": ".join(filter(None, (status.detail, why)))) if waits else status


def lines(pieces: Iterable[str]) -> Iterator[str]:
    """Whole lines, with line ends, from pieces of text; a last line without an end gets one. A line longer than LONGEST
    comes in parts, cut at the same places however the pieces are cut."""
    held, size = list[str](), 0  # the beginning of a line, and its length
    for piece in pieces:
        *whole, rest = piece.split("\n")
        for line in whole:
            *parts, last = cut("".join(held) + line)
            yield from parts
            yield last + "\n"
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > LONGEST:
            *parts, last = cut("".join(held))
            yield from parts
            held, size = [last], len(last)
    if "".join(held):
        yield "".join(held) + "\n"


def cut(line: str) -> list[str]:
    return [line[at:at + LONGEST] for at in range(0, len(line), LONGEST)] or [line]


def so_far(pieces: Iterator[str]) -> Iterator[str]:
    """The log so far, from a stream that follows its pod: until it is silent for QUIET_S, or for SO_FAR_S at most."""
    came: queue.Queue[str | Exception | None] = queue.Queue(64)  # bounded: the reader waits for what is not taken

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
