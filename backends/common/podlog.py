"""What pods say in their logs, as the launcher reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable

ENDED = re.compile(r"airlift: rank (\S+) ended with exit code (\d+)")  # a pod's last line (pod/entry.py)
BEGUN = re.compile(r"airlift: rank \d+ of \d+, sha256 .*, begun ")  # its first, where the job may be retried
NOT_WHOLE = "airlift_pod_program_did_not_arrive_whole"  # of the bootstrap in transport.py
ECHOES = (137, 143)  # killed: what the other ranks say when a job ends because of one


def codes_in(lines: Iterable[str]) -> dict[str, int]:
    """rank, as the pod says it -> exit code; what comes later counts."""
    return {found.group(1): int(found.group(2)) for found in map(ENDED.search, lines) if found}


def first_failure(codes: dict[str, int]) -> int | None:
    """The exit code that the job failed with: an echo of another rank's end only where there is nothing else."""
    failures = [code for _, code in sorted(codes.items()) if code]
    return next((code for code in failures if code not in ECHOES), failures[0] if failures else None)
