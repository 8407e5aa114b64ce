"""Progress of long work: a line that moves on a terminal, and one line at the end anywhere else.

Where the output goes to a log, the launcher may name a file (PROGRESS_FILE): the line goes there, and it shows it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time

PAUSE = 0.2  # seconds from line to line


class Progress:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.bytes, self.rows = what, total, 0.0, 0
        self.began = time.monotonic()
        self.shown = float("-inf")  # the first word comes at once
        self.terminal, self.file = sys.stdout.isatty(), os.environ.get("PROGRESS_FILE")
        self.add(0, 0)

    def add(self, size: float, rows: int) -> None:
        self.bytes, self.rows = self.bytes + size, self.rows + rows
        if not self.terminal and not self.file:
            return
        now = time.monotonic()
        if now - self.shown >= PAUSE:
            self.shown = now
            left = (now - self.began) * max(0, self.total - self.bytes) / max(1, self.bytes)
            when = f"{int(left) // 60}:{int(left) % 60:02d} left" if self.bytes else ""
            self.show(f"{self.told(now)}  {when}")

    def told(self, now: float) -> str:
        rate = self.bytes / max(1e-9, now - self.began) / 1e6
        size = f"{self.bytes / 1e6:,.1f} of {self.total / 1e6:,.1f} MB"
        return f"{self.what}: {self.rows:,} rows, {size}, {rate:,.0f} MB/s"

    def show(self, line: str) -> None:
        if self.terminal:
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="", flush=True)
        if self.file:
            with contextlib.suppress(OSError):  # work never ends for its progress
                with open(f"{self.file}.new", "w", encoding="utf-8") as file:
                    file.write(line)
                os.replace(file.name, self.file)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.show("")
        if error is None:
            seconds = time.monotonic() - self.began
            print(f"{self.what}: {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB in {seconds:.1f} s", flush=True)
