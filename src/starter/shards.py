"""JSONL shards: the blend file that lists them, ranges of their bytes for parallel work, and which rows to hold out.

A blend is JSON, with paths relative to itself (a file, a folder of *.jsonl, or a pattern like shards/*.jsonl):

    {"datasets": [{"name": "math", "path": "math.jsonl", "split": "train"}, …]}

A row's key is the SHA-256 of the seed and the row as it stands in the shard. The rows with the N lowest keys of a split
are held out: which ones they are depends on the rows and the seed alone, not on their order; copies of a row have one
key and stay together, unless the N-th falls between them. The keys of a shard, hashed, also tell whether it changed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from starter.config import RecipeError, build
from starter.files import BLOCK

NEWLINE = 10
PASSED_THROUGH = {"validation": "val", "valid": "val", "val": "val", "dev": "val", "eval": "val", "test": "test"}


@dataclass(frozen=True)
class Dataset:
    name: str
    path: str
    split: str = "train"
    weight: float = 1.0  # its share in training, for pretrain
    text_field: str = "text"


@dataclass(frozen=True)
class Shard:
    dataset: Dataset
    path: Path


@dataclass(frozen=True)
class Range:
    """The lines of a shard that begin in these bytes."""

    shard: Shard
    start: int
    end: int


@dataclass(frozen=True)
class Scan:
    """What a first look at a range found: its rows, the digest of their keys, and the lowest keys with their places."""

    rows: int
    digest: bytes
    lowest: list[tuple[bytes, int]]


@dataclass(frozen=True)
class Held:
    """A row to hold out: the number of its range, and the byte of the shard at which it begins."""

    part: int
    at: int


# ---------------------------------------------------------------- blend


def read_blend(path: Path) -> dict[str, list[Shard]]:
    """The shards of each source split, in the order of the blend."""
    try:
        blend = json.loads(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"cannot read the blend {path}: {error.strerror}.\nGive it as blend=FILE.") from error
    except ValueError as error:
        raise RecipeError(f"the blend {path} is not JSON: {error}\nMend it there.") from error
    if not isinstance(blend, dict) or list(blend) != ["datasets"] or not isinstance(blend["datasets"], list):
        raise RecipeError(f'{path} is not a blend.\nWrite {{"datasets": [{{"name": "a", "path": "a.jsonl"}}]}}.')
    splits: dict[str, list[Shard]] = {}
    weights: dict[tuple[str, str], float] = {}
    for number, item in enumerate(blend["datasets"]):
        dataset = build(Dataset, item, f"{path.name}: datasets.{number}")
        if not all(re.fullmatch(r"\w[\w.-]*", word) for word in (dataset.name, dataset.split)) or (
            dataset.split == "manifest.json"
        ):
            raise RecipeError(
                f"{path}: name {dataset.name!r} and split {dataset.split!r} must be plain words.\n"
                "They name files: use letters, digits, -, _ and dots."
            )
        if not dataset.weight > 0:
            raise RecipeError(f"{path}: the weight of {dataset.name} is {dataset.weight}.\nGive a positive number.")
        if weights.setdefault((dataset.split, dataset.name), dataset.weight) != dataset.weight:
            raise RecipeError(f"{path}: {dataset.name} has two weights.\nGive its entries one weight, or two names.")
        splits.setdefault(dataset.split, []).extend(Shard(dataset, file) for file in find_shards(dataset, path))
    if not splits:
        raise RecipeError(f"the blend {path} lists no dataset.\nAdd one to its datasets.")
    return splits


def find_shards(dataset: Dataset, blend: Path) -> list[Path]:
    if "://" in dataset.path:
        raise RecipeError(
            f"{blend}: {dataset.name} is at {dataset.path}, and this recipe reads local files only.\n"
            "Bring it to storage that the pod sees, as JSONL, and name it there."
        )
    path = blend.parent / dataset.path
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
    elif any(mark in dataset.path for mark in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(path)))
    else:
        files = [path]
    for file in files:
        if not os.access(file, os.R_OK) or not file.is_file():
            raise RecipeError(f"{blend}: cannot read the shard {file} of {dataset.name}.\nMend its path there.")
        if file.stat().st_size == 0:
            raise RecipeError(f"the shard {file} of {dataset.name} is empty.\nFill it, or take it out of {blend}.")
    if not files:
        raise RecipeError(f"{blend}: no *.jsonl is in {path}, for {dataset.name}.\nMend its path there.")
    return files


# ---------------------------------------------------------------- ranges


def cut(shards: Iterable[Shard], size: int) -> list[Range]:
    """Ranges of ``size`` bytes: the same for the same files, whatever the machine."""
    ranges = []
    for shard in shards:
        total = shard.path.stat().st_size
        ranges += [Range(shard, start, min(start + size, total)) for start in range(0, total, size)]
    return ranges


def open_at(part: Range) -> tuple[BinaryIO, int]:
    """The shard, opened where the first line of the range begins, and that place."""
    file = part.shard.path.open("rb", buffering=BLOCK)
    if not part.start:
        return file, 0
    file.seek(part.start - 1)
    return file, part.start - 1 + len(file.readline())


def blank(line: bytes) -> bool:
    """JSON knows four blanks; Python's isspace knows more."""
    return line.isspace() and not line.strip(b" \t\r\n")


def lines(part: Range) -> Iterator[tuple[int, bytes]]:
    """The lines of a range that are not blank, with their places. One line at a time is in memory."""
    file, at = open_at(part)
    with file:
        while at < part.end and (line := file.readline()):
            if not blank(line):
                yield at, line if line.endswith(b"\n") else line + b"\n"
            at += len(line)


def bad_row(part: Range, at: int, what: str, fix: str) -> RecipeError:
    """An error that names file and line of the row at byte ``at``."""
    number = 1
    with part.shard.path.open("rb", buffering=0) as file:
        while at > 0 and (block := file.read(min(at, BLOCK))):
            number += block.count(b"\n")
            at -= len(block)
    return RecipeError(f"{part.shard.path}:{number}: {what}.\n{fix}")


def parse_row(part: Range, at: int, line: bytes) -> dict[str, Any]:
    """The row, from JSON. Raises an error that names file and line."""
    try:
        row = read_json(line)
    except ValueError as error:
        raise bad_row(part, at, f"not JSON ({error})", "Mend that line: no row is left out in silence.") from error
    if not isinstance(row, dict):
        raise bad_row(part, at, "not a JSON object", "Write one object with the row's fields on each line.")
    return row


def refuse_empty(ranges: Iterable[Range], scans: Iterable[Scan]) -> None:
    """A shard of blank lines is as empty as one of no bytes."""
    rows: dict[Path, int] = {}
    for part, found in zip(ranges, scans, strict=True):
        rows[part.shard.path] = rows.get(part.shard.path, 0) + found.rows
    for path, count in rows.items():
        if not count:
            raise RecipeError(f"the shard {path} is empty: its lines are blank.\nFill it, or take it out of the blend.")


DECODER = json.JSONDecoder()


def read_json(line: bytes) -> Any:
    """What Python makes of a line of JSON in UTF-8, with NaN and Infinity. Raises ValueError."""
    try:
        return DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}: {error.reason}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# ---------------------------------------------------------------- keys and holdout


class Lowest:
    """The ``count`` lowest keys of those that were added, with their places; the earlier of two that are the same."""

    def __init__(self, count: int) -> None:
        self.count, self.rows = count, list[tuple[bytes, int]]()
        self.bound = b"\xff" * 33 if count else b""  # a key that is not below it need not be added

    def add(self, key: bytes, at: int) -> None:
        self.rows.append((key, at))
        if len(self.rows) > 2 * self.count + 64:
            self.cut()

    def cut(self) -> list[tuple[bytes, int]]:
        self.rows = sorted(self.rows)[: self.count]
        if len(self.rows) == self.count and self.count:
            self.bound = self.rows[-1][0]
        return self.rows


def scan(part: Range, seed: int, holdout: int, visit: Callable[[int, bytes], None] | None = None) -> Scan:
    """Look at a range as bytes. Blank lines are no rows. ``visit`` is shown every line and its place."""
    prefix, keys, lowest, rows, sha256 = b"%d:" % seed, hashlib.sha256(), Lowest(holdout), 0, hashlib.sha256
    file, at = open_at(part)
    with file:
        for line in file:
            if at >= part.end:
                break
            place, at = at, at + len(line)
            if visit:
                visit(place, line)
            if blank(line):
                continue
            key = sha256(prefix + line if line[-1] == NEWLINE else prefix + line + b"\n").digest()
            keys.update(key)
            rows += 1
            if key < lowest.bound:
                lowest.add(key, place)
    return Scan(rows, keys.digest(), lowest.cut())


def choose(scans: list[Scan], count: int) -> list[Held]:
    """The ``count`` rows to hold out of all ranges, by key; none where that would leave nothing to train on."""
    if sum(found.rows for found in scans) <= count:
        return []
    everyone = sorted((key, i, at) for i, found in enumerate(scans) for key, at in found.lowest)
    return [Held(i, at) for key, i, at in everyone[:count]]
