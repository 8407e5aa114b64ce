"""Logs of pods that are gone, from the log store of a Lepton workspace: GET /logs, in pages by time."""

import collections
import re
import time
from collections.abc import Iterator
from typing import Any

from backends.common.lepton_client import read
from runs import Run
from transport import Refusal

PAGE = 10_000  # lines of one answer (`lep log get` of leptonai 0.47.1)
MOST = 1_000_000  # lines that are read of one log: the newest
EARLIER_S = 3600  # this machine's clock may be ahead of the platform's

Line = tuple[int, str]  # (nanoseconds since 1970, text)


def kept(client: Any, run: Run, rank: int, replica: str = "") -> Iterator[str] | None:
    """What the workspace has kept of a rank's log, or of that replica's, oldest line first; None for nothing. The store
    gives the newest lines first: each page ends where the one before it began. Raises Refusal."""
    begin, end = int(run.started - EARLIER_S) * 10**9, time.time_ns()
    lines: list[Line] = []
    while len(lines) < MOST:
        page = _page(client, run, replica, begin, end)
        edge = collections.Counter(line for line in lines if line[0] == end - 1)  # what both pages have
        mine = [line[:2] for line in page if line[2] is None or line[2] == rank]
        lines = [line for line in mine if not _taken(edge, line)] + lines
        if len(page) < PAGE:
            break
        first, last = page[0][0], page[-1][0]
        end = first + (first < last)  # a page of one moment is not asked for twice
    return (text + "\n" for _, text in lines) if lines else None


def _taken(edge: "collections.Counter[Line]", line: Line) -> bool:
    edge[line] -= 1
    return edge[line] >= 0


def _page(client: Any, run: Run, replica: str, begin: int, end: int) -> list[tuple[int, str, int | None]]:
    """(nanoseconds, text, rank) of each line, oldest first; the rank is None where one replica's were asked for."""
    query = {"job": run.record["job"], "start": str(begin), "end": str(end), "timestamps": "true",
             "direction": "backward", "limit": str(PAGE), "q": "", "job_query_mode": "alive_and_archive"}
    try:
        found = read("read the workspace's logs", client, "/logs", **query | ({"replica": replica} if replica else {}))
    except Refusal as refusal:
        if refusal.http == 404:
            return []
        raise
    pods = re.compile(re.escape(run.record["job"]) + r"-(\d+)(-|$)")
    try:
        page = [(int(value[0]), str(value[1]), None if replica else _rank(pods, stream["stream"]))
                for stream in found["data"]["result"] for value in reversed(stream["values"])]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise Refusal("Lepton at %s did not answer with lines to: read the workspace's logs" % client.url,
                      "read them in the console", 5) from None
    return sorted(page, key=lambda line: line[0])


def _rank(pods: "re.Pattern[str]", labels: dict[str, Any]) -> int:
    """The rank of a stream's pod, which one of its labels names; -1 for none."""
    found = next(filter(None, map(pods.match, map(str, labels.values()))), None)
    return int(found[1]) if found else -1
