"""What the three data preps share: scan the splits of a blend, build what is new, publish it with a manifest.

    <output>/<split>/…             what a split became, with .receipt.json: from what it was made, and its files
    <output>/manifest.json         written last (see manifest.py); absent while a split is being replaced
    <output>/.work, .lock          of the run at work

A split is built in .work and renamed into place with its receipt, so that it is there whole or not at all. Nothing
else is remembered: a run after a kill keeps the splits whose receipt fits (the same rows, the same config, files with
the SHA-256 they had) and builds the others anew. The files depend on rows and config alone, not on the machine, the
number of workers or the time, so that they come out the same, byte for byte.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from starter import shards
from starter.config import RecipeError, parse_args
from starter.files import only_run, sha256, sync_folder, write_json
from starter.manifest import say
from starter.pool import parallel
from starter.progress import Progress
from starter.shards import Held, Range, Scan, Shard

A = TypeVar("A")
B = TypeVar("B")
RECEIPT = ".receipt.json"


@dataclass(frozen=True, kw_only=True)
class PrepConfig:
    output: str
    blend: str
    holdout: int = 100  # rows of each split that are kept for validation
    seed: int = 1234
    force: bool = False  # build anew what is there already
    workers: int | None = None  # processes; by default the cores of this machine

    def __post_init__(self) -> None:
        if self.holdout < 0:
            raise RecipeError(f"holdout is {self.holdout}.\nGive the number of rows to hold out, 0 for none.")


Config = TypeVar("Config", bound=PrepConfig)


@dataclass(frozen=True)
class Split:
    """A split of the source. ``part`` is "train" where rows are held out of it, else what it is passed through as."""

    source: str
    shards: list[Shard]

    @property
    def part(self) -> str:
        return shards.PASSED_THROUGH.get(self.source.lower(), "train")

    @property
    def name(self) -> str:
        return self.source if self.part == "train" else self.part


@dataclass(frozen=True)
class Built:
    """Where a split's parts lie in its folder (train, val, test), and its files: name -> rows, bytes, sha256."""

    parts: dict[str, str]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One range to turn into files of a split: ``name`` in folder/kept, and in folder/val what is held out."""

    part: Range
    held: frozenset[int]  # where rows begin that are held out
    folder: Path
    kept: str
    name: str


@dataclass(frozen=True)
class Done:
    rows: int
    files: dict[str, dict[str, Any]]


class Prep(Protocol):
    """What is special to one data prep."""

    mode: str
    range_size: int
    takes: tuple[str, ...]  # what of a blend's entries is of use besides name, path and split

    def begin(self, scratch: Path) -> None:
        """Get ready, before the first scan."""

    def ingredients(self) -> Any:
        """What decides the output besides rows, holdout and seed, for JSON."""

    def look(self, part: Range, seed: int, holdout: int) -> Scan:
        """shards.scan, or with it all that one pass over a range that is to be built can find."""

    def build(self, split: Split, ranges: list[Range], scans: list[Any], held: list[Held], folder: Path) -> Built:
        """Fill ``folder``. What can be wrong with a row has been looked at by then, or is now."""

    def finish(self, output: Path, manifest: dict[str, Any], splits: list[Split]) -> None:
        """Add to the manifest, and write what belongs to no split."""


def main(recipe: Path, config: type[Config], start: Callable[[Config, Path], Prep]) -> NoReturn:
    """Run with the arguments of this process. ``recipe`` is the folder that relative paths of the config start from."""
    try:
        cfg = parse_args(config, sys.argv[1:])
        run(cfg, recipe, start(cfg, recipe))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename or 'the output'}: {error.strerror}"
        print(f"error: {what}\nFree space there, or mend its rights; then start again.", file=sys.stderr, flush=True)
        sys.exit(1)
    sys.exit(0)


def run(cfg: PrepConfig, recipe: Path, prep: Prep) -> Path:
    """Prepare all splits. Returns the manifest's path."""
    output = Path(os.environ.get("NEMO_RUN_DIR", "."), cfg.output)
    splits = [Split(source, files) for source, files in shards.read_blend(recipe / cfg.blend).items()]
    if len({split.name for split in splits}) < len(splits):
        raise RecipeError(f"two splits of {recipe / cfg.blend} mean the same.\nGive them one name there.")
    refuse_useless(prep, splits)
    refuse_own(output, splits)
    path, scratch = output / "manifest.json", output / ".work"
    with only_run(output):
        for split in splits:
            refuse_foreign(output / split.name)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            prep.begin(scratch)
            receipts = [prepare(cfg, prep, split, output, scratch) for split in splits]
            manifest = describe(prep, splits, receipts)
            drop_others(output, {split.name for split in splits})
            prep.finish(output, manifest, splits)
            if stored(path) != manifest:
                write_json(path, manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    say(f"prepared: {path}")
    return path


def prepare(cfg: PrepConfig, prep: Prep, split: Split, output: Path, scratch: Path) -> dict[str, Any]:
    """Build one split, unless what is there fits. Returns its receipt."""
    folder, holdout = output / split.name, cfg.holdout if split.part == "train" else 0
    ranges = shards.cut(split.shards, prep.range_size)
    before = stamps(split)

    def read(look: Callable[..., Scan]) -> list[Scan]:
        work = functools.partial(look, seed=cfg.seed, holdout=holdout)
        return watched(f"{split.name}: read", work, ranges, ranges, cfg.workers)

    old = read_receipt(folder)
    if old and not cfg.force:
        scans = read(shards.scan)
        if old["key"] == split_key(cfg, prep, split, holdout, scans) and intact(folder, old, cfg.workers):
            say(f"{split.name}: unchanged, {sum(found.rows for found in scans):,} rows")
            return old
        say(f"{split.name}: not what is there now: built anew")
    scans = read(prep.look)
    shards.refuse_empty(ranges, scans)
    rows, key = sum(found.rows for found in scans), split_key(cfg, prep, split, holdout, scans)
    held = shards.choose(scans, holdout)
    if holdout and not held:
        say(f"{split.name}: only {rows} rows, and {holdout} were to be held out: all of them go to train")
    new = scratch / split.name
    new.mkdir()
    built = prep.build(split, ranges, scans, held, new)
    if stamps(split) != before:
        raise RecipeError(f"a shard of {split.name} changed while it was read.\nWait until it is written, then again.")
    receipt = {"key": key, "parts": built.parts, "files": built.files}
    write_json(new / RECEIPT, receipt)
    publish(new, folder, scratch)
    say(f"{split.name}: {rows - len(held):,} rows for {split.part}" + (f", {len(held):,} for val" if held else ""))
    return receipt


def refuse_useless(prep: Prep, splits: list[Split]) -> None:
    """Say that a blend asks for something that this data prep has no use for."""
    for shard in (shard for split in splits for shard in split.shards):
        for name, unset in (("weight", 1.0), ("text_field", "text")):
            if name not in prep.takes and getattr(shard.dataset, name) != unset:
                raise RecipeError(
                    f"{shard.dataset.name} has a {name} in the blend, which data/prep/{prep.mode} has no use for.\n"
                    "Leave it out there."
                )


def watched(
    what: str, work: Callable[[A], B], items: Sequence[A], ranges: Sequence[Range], workers: int | None
) -> list[B]:
    """The results of ``work`` on all items, one for each range, in parallel and with progress."""
    results = []
    with Progress(what, sum(part.end - part.start for part in ranges)) as progress:
        for part, result in zip(ranges, parallel(work, items, workers), strict=True):
            progress.add(part.end - part.start, getattr(result, "rows", 0))
            results.append(result)
    return results


def stamps(split: Split) -> list[tuple[int, int, int]]:
    return [stamp(shard.path) for shard in split.shards]


def stamp(file: Path) -> tuple[int, int, int]:
    """What changes when someone writes to a file, or puts another in its place."""
    info = file.stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def split_key(cfg: PrepConfig, prep: Prep, split: Split, holdout: int, scans: list[Scan]) -> str:
    """What the output of a split depends on, hashed."""
    names = [(s.dataset.name, s.dataset.text_field, s.dataset.weight) for s in split.shards]
    facts = [prep.mode, prep.ingredients(), split.source, names, holdout, cfg.seed, [s.digest.hex() for s in scans]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def build_parts(
    what: str, work: Callable[[Task], Done], split: Split, ranges: list[Range], held: list[Held], folder: Path,
    workers: int | None,
) -> Built:  # fmt: skip
    """Have ``work`` turn each range into files of its own: DATASET-NUMBER, whatever suffix it gives them."""
    parts = [split.part, "val"] if held else [split.part]
    for part in parts:
        (folder / part).mkdir()
    tasks = [
        Task(part, places, folder, split.part, f"{part.shard.dataset.name}-{i:05d}")
        for i, (part, places) in enumerate(zip(ranges, held_places(ranges, held), strict=True))
    ]
    done = watched(f"{split.name}: {what}", work, tasks, ranges, workers)
    for part in parts:
        sync_folder(folder / part)
    return Built({part: part for part in parts}, {name: facts for one in done for name, facts in one.files.items()})


def held_places(ranges: list[Range], held: list[Held]) -> list[frozenset[int]]:
    """For each range, where the rows begin that are held out of it."""
    places: list[set[int]] = [set() for _ in ranges]
    for row in held:
        places[row.part].add(row.at)
    return [frozenset(found) for found in places]


# ---------------------------------------------------------------- what lies in the output folder


def stored(path: Path) -> Any:
    """The JSON in a file; None where there is none, or it is damaged: then it is written anew."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a split that was published here, and is so whole."""
    receipt = stored(folder / RECEIPT)
    return receipt if isinstance(receipt, dict) and {"key", "parts", "files"} <= set(receipt) else None


def refuse_own(output: Path, splits: list[Split]) -> None:
    """What is read must not lie where it is replaced."""
    for split in splits:
        for shard in split.shards:
            for folder in (output / other.name for other in splits):
                if shard.path.resolve().is_relative_to(folder.resolve()):
                    raise RecipeError(f"{shard.path} lies in the output, {folder}.\nMove it, or set output=FOLDER.")


def refuse_foreign(folder: Path) -> None:
    if folder.exists() and not (folder / RECEIPT).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RecipeError(f"{folder} is there, and no data prep wrote it.\nMove it, or set output=FOLDER.")


def _same(item: tuple[Path, str]) -> bool:
    return item[0].is_file() and sha256(item[0]) == item[1]


def intact(folder: Path, receipt: dict[str, Any], workers: int | None) -> bool:
    """Whether the files are still what was written."""
    return all(parallel(_same, [(folder / name, facts["sha256"]) for name, facts in receipt["files"].items()], workers))


def publish(new: Path, folder: Path, scratch: Path) -> None:
    """Put a finished split in its place. No manifest tells of it before all splits are there."""
    (folder.parent / "manifest.json").unlink(missing_ok=True)
    sync_folder(new)
    if folder.exists():
        folder.rename(scratch / f"{folder.name}.old")
    new.rename(folder)
    sync_folder(folder.parent)


def drop_others(output: Path, names: set[str]) -> None:
    """Remove splits of an earlier blend, which the new manifest does not name."""
    for path in output.glob("*/" + RECEIPT):
        if path.parent.name not in names:
            (output / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path.parent)


def describe(prep: Prep, splits: Iterable[Split], receipts: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest. ``train`` is the split of that name, else the first; the source's own val goes before a holdout."""
    places: dict[str, dict[str, str]] = {}
    files: dict[str, Any] = {}
    for split, receipt in zip(splits, receipts, strict=True):
        places[split.name] = {part: f"{split.name}/{path}" for part, path in receipt["parts"].items()}
        files |= {f"{split.name}/{name}": facts for name, facts in receipt["files"].items()}
    trained = {split.name: places[split.name] for split in splits if split.part == "train"}
    primary = trained.get("train") or next(iter(trained.values()), {})
    keys = hashlib.sha256(json.dumps([receipt["key"] for receipt in receipts]).encode()).hexdigest()
    return {
        "train": primary.get("train"),
        "val": places.get("val", {}).get("val") or primary.get("val"),
        "test": places.get("test", {}).get("test"),
        "mode": prep.mode,
        "source_splits": [split.source for split in splits],
        "run_hash": keys[:16],
        "splits": {name: {"train": None, "val": None} | parts for name, parts in places.items()},
        "files": files,
    }
