"""What a person sees: times, tables, budgets, and colour only where it belongs."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import layout
import pytest
from hypothesis import given
from hypothesis import strategies as st

import screen
from backends import Status
from runs import Run


@pytest.mark.parametrize("seconds, said", [
    (-1, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"),
    (86400 * 3 + 3600 * 4 + 61, "3 d 4 h")])
def test_times(seconds: float, said: str) -> None:
    assert screen.span(seconds) == said


def test_where_the_time_went() -> None:
    run = Run("t23456", "a/b", "p", "local", 1, "0" * 64, 100.0)
    assert screen.times(run, 0.25, 2.0, 161.0) == "packing 0.2 s, submitting 2.0 s, waiting and running 59 s"
    run.running_since = 110.5
    assert screen.times(run, 0.25, 2.0, 161.0) == "packing 0.2 s, submitting 2.0 s, waiting 8.5 s, running 51 s"


def test_a_state_is_told_with_its_time_only_while_it_is_news() -> None:
    run = Run("t23456", "a/b", "p", "local", 1, "0" * 64)
    assert re.fullmatch(r"-- done \(Completed\) after \d s", screen.status_line(Status("done", "Completed"), run))
    run.ended = ["done", "Completed"]
    assert screen.status_line(Status("done", "Completed"), run) == "-- done (Completed)"


@given(st.lists(st.lists(st.text("ab c", max_size=9), min_size=3, max_size=3), min_size=1, max_size=6))
def test_columns_are_aligned(rows: list[list[str]]) -> None:
    rows = [["x" + cell for cell in row] for row in rows]  # no cell is empty
    lines = screen.table(rows).split("\n")
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row, line in zip(rows, lines, strict=True):
        at = 0
        for cell, width in zip(row, widths, strict=True):
            assert line[at:at + len(cell)].rstrip() == cell.rstrip()
            at += width + 2


@pytest.mark.parametrize("used, bar, figures", [
    (0, "." * 20, "0 % of 1.5 MiB (0 B)"), (1, "#" + "." * 19, "1 % of 1.5 MiB (1 B)"),
    (1572864, "#" * 20, "100 % of 1.5 MiB (1.5 MiB)"), (1572865, "#" * 20, "101 % of 1.5 MiB (1.5 MiB)")])
def test_a_budget_is_drawn_and_never_looks_emptier_than_it_is(used: int, bar: str, figures: str) -> None:
    assert re.fullmatch(r"API object  \|%s\| +%s" % (re.escape(bar), re.escape(figures)),
                        screen.budget("API object", used, 1572864))


def on_a_terminal(home: Path, **env: str) -> str:
    """What a dry run prints on a terminal of its own."""
    words = [sys.executable, str(layout.REPO / "launch.py"), "nano3", "sft", "lepton", "--dry-run"]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=home,
                          env=clean | {"TERM": "xterm", "AIRLIFT_HOME": str(home)} | env) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            said += data
            if not data:
                break
    os.close(ours)
    assert process.returncode == 0
    return said.decode().replace("\r\n", "\n")


def test_colour_only_on_a_terminal_and_never_with_no_color(tmp_path: Path) -> None:
    coloured = on_a_terminal(tmp_path)
    plain = on_a_terminal(tmp_path, NO_COLOR="1")
    assert "\033[32m#" in coloured and "\033[1mnano3/sft on lepton" in coloured
    assert "\033" not in plain + on_a_terminal(tmp_path, TERM="dumb")
    assert re.sub(r"\033\[\d*m", "", coloured) == plain
