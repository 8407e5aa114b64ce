"""Progress of long work: a line that moves on a terminal, and one line at the end anywhere else."""

from __future__ import annotations

import sys
import time


class Progress:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.bytes, self.rows = what, total, 0, 0
        self.began = time.monotonic()
        self.shown = float("-inf")  # the first word comes at once
        self.live = sys.stdout.isatty()
        self.add(0, 0)

    def add(self, size: int, rows: int) -> None:
        self.bytes, self.rows = self.bytes + size, self.rows + rows
        now = time.monotonic()
        if self.live and now - self.shown >= 0.2:
            self.shown = now
            left = (now - self.began) * max(0, self.total - self.bytes) / max(1, self.bytes)
            when = f"{int(left) // 60}:{int(left) % 60:02d} left" if self.bytes else ""
            print(f"\r{self.told(now)}  {when}\x1b[K", end="", flush=True)

    def told(self, now: float) -> str:
        rate = self.bytes / max(1e-9, now - self.began) / 1e6
        size = f"{self.bytes / 1e6:,.1f} of {self.total / 1e6:,.1f} MB"
        return f"{self.what}: {self.rows:,} rows, {size}, {rate:,.0f} MB/s"

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", flush=True)

    def end(self) -> None:
        self.clear()
        seconds = time.monotonic() - self.began
        print(f"{self.what}: {self.rows:,} rows, {self.bytes / 1e6:,.1f} MB in {seconds:.1f} s", flush=True)
