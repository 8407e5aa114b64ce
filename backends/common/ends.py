"""How the ranks of a job ended, by the lines of their logs: exit codes, the rank that failed first, and its reason."""

import re

from pod.failures import FAILURES, POD

ENDED = re.compile(r"airlift: rank (\S+) ended with exit code (\d{1,3})\b")  # a pod's last line (pod/entry.py)
BEGUN = re.compile(r"airlift: rank \d+ of \d+, sha256 .*, begun ")  # its first, where the job may be retried
NOT_WHOLE = "airlift_pod_program_did_not_arrive_whole"  # of the bootstrap in transport.py
FAILED = re.compile(r"airlift: rank (\d+): ([^:]+):")  # before that, where it fails itself (pod/failures.py)
SENTENCES = {sentence: code for code, (sentence, _) in FAILURES.items()}
ECHOES = (137, 143)  # killed: the exit codes of other ranks when a job ends because of one
TRACEBACK = "Traceback (most recent call last):"
# What torch, Gloo and NCCL raise in the other ranks then.
PEER = re.compile(r"DistStoreError|DistNetworkError|ChildFailedError|by peer|Broken pipe|recvValue|TCPStore"
                  r"|Socket Timeout|remote process exited")
STALE = 1000  # lines after which a traceback was of something that the recipe has survived


def code_in(rank: int, line: str) -> int | None:
    """The exit code in a line of the log of `rank`, if it is about that rank."""
    if line.startswith(NOT_WHOLE):
        return POD
    found = [int(code) for name, code in ENDED.findall(line) if name in (str(rank), "?", "unknown")]
    return found[-1] if found else None


class Ends:
    """What is known of the ends of a job's ranks."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}  # rank -> exit code, as its pod said it last
        self.own: dict[int, int] = {}  # rank -> code of a failure of its pod's own, which may be killed before it ends
        self.echoes: set[int] = set()  # ranks whose last traceback is about another one's end
        self.why: dict[int, list[str]] = {}  # rank -> the end of its last traceback that is not
        self.held: dict[int, tuple[str, list[str]]] = {}  # rank -> what begins each line of a traceback, and its end
        self.after: dict[int, int] = {}  # rank -> lines since its last traceback

    def note(self, rank: int, line: str) -> None:
        """Note what a line of that rank's log says of its end. A recipe can print such a line, but not in the log of
        another rank, and not after the pod's own: so only the last line counts, except for what Slurm adds."""
        code, failed = code_in(rank, line), FAILED.match(line)
        if failed and failed.group(1) == str(rank) and failed.group(2) in SENTENCES:
            self.own[rank] = SENTENCES[failed.group(2)]
        if code is not None:
            self.codes[rank] = code
        elif line.strip() and not line.startswith(("slurmstepd: ", "srun: ")):
            self.codes.pop(rank, None)
            self._traceback(rank, line)

    def _traceback(self, rank: int, line: str) -> None:
        text = line.rstrip()[:300]
        before, found, _ = text.partition(TRACEBACK)
        prefix, end = self.held.get(rank, ("", None))
        self.after[rank] = self.after.get(rank, 0) + 1
        if self.after[rank] > STALE:
            self.why.pop(rank, None)
            self.echoes.discard(rank)
        if found:
            self.held[rank] = before, []
        elif end is not None and text.startswith(prefix):
            text = text[len(prefix):]
            if not re.fullmatch(r"[\s~^]*", text):
                end[:] = [*end[-2:], text]
            if text and not text[0].isspace():  # its last line
                del self.held[rank]
                self.after[rank] = 0
                if PEER.search(text):
                    self.echoes.add(rank)
                else:
                    self.why[rank] = end
                    self.echoes.discard(rank)

    def failed(self) -> dict[int, int]:
        """The exit codes of the ranks that failed; that of a failure of the pod's own, where it was killed then."""
        whole = {**self.own, **{rank: code for rank, code in self.codes.items()
                                if code not in ECHOES or rank not in self.own}}
        return {rank: code for rank, code in whole.items() if code}

    def first(self) -> int | None:
        """The rank that the job failed with: one that was killed, or that tells of another's end, only if there is no
        other; None if none failed."""
        codes = self.failed()
        return min(codes, key=lambda rank: (self._echo(rank, codes[rank]), rank in self.own, rank), default=None)

    def _echo(self, rank: int, code: int) -> bool:
        return code in ECHOES or (rank in self.echoes and rank not in self.why)

    def code(self) -> int | None:
        """The exit code of that rank."""
        rank = self.first()
        return None if rank is None else self.failed()[rank]

    def said(self) -> tuple[str, ...]:
        """That rank in words, with the end of its traceback; () if it is not certain."""
        codes, rank = self.failed(), self.first()
        if rank is None or self._echo(rank, codes[rank]):
            return ()
        return ("rank %d failed with exit code %d" % (rank, codes[rank]), *self.why.get(rank, ()))
