"""What pods say in their logs, as the launcher reads it."""

from __future__ import annotations

import re

from pod.failures import POD

ENDED = re.compile(r"airlift: rank (\S+) ended with exit code (\d+)")  # a pod's last line (pod/entry.py)
BEGUN = re.compile(r"airlift: rank \d+ of \d+, sha256 .*, begun ")  # its first, where the job may be retried
NOT_WHOLE = "airlift_pod_program_did_not_arrive_whole"  # of the bootstrap in transport.py
ECHOES = (137, 143)  # killed: what the other ranks say when a job ends because of one


def note(codes: dict[str, int], rank: str, line: str) -> None:
    """Note in `codes` (rank -> exit code) what a line of that rank's log tells. Only a pod's last word tells its code:
    what is said of other ranks, or followed by more, is the recipe's own talk; so is not what slurmstepd adds."""
    found = ENDED.fullmatch(line.rstrip())
    if line.startswith(NOT_WHOLE):
        codes[rank] = POD
    elif found and found.group(1) in (rank, "?", "unknown"):
        codes[rank] = int(found.group(2))
    elif line.strip() and not line.startswith("slurmstepd: "):
        codes.pop(rank, None)


def first_failure(codes: dict[str, int]) -> int | None:
    """The exit code that the job failed with: an echo of another rank's end only where there is nothing else."""
    failures = [code for _, code in sorted(codes.items()) if code]
    return next((code for code in failures if code not in ECHOES), failures[0] if failures else None)
