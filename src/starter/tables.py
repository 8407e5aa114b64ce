"""Source tables that placeholder rows are filled from: JSONL, or Parquet where pyarrow is, looked up by row number."""

from __future__ import annotations

import array
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starter import shards
from starter.config import RecipeError
from starter.progress import Progress


@dataclass(frozen=True)
class TableConfig:
    path: str  # a .jsonl or .parquet file, or a folder of them, relative to the recipe's folder
    template: str  # "dapo" or "skywork"
    question: str = "prompt.0.content"
    answer: str = "reward_model.ground_truth"


@dataclass(frozen=True)
class Table:
    """Rows as JSON in one file, and where each begins in another, so that a worker gets by with two names."""

    name: str
    rows: str
    index: str
    template: str
    question: str
    answer: str

    def question_and_answer(self, row: Any) -> tuple[str, Any]:
        """Raises ValueError that names the table and what is wrong."""
        rows, index, count = opened(self.rows, self.index)
        if type(row) is not int or not 0 <= row < count:
            raise ValueError(f"row {row!r} is not among the {count} rows of {self.name}")
        start, end = array.array("Q", os.pread(index, 16, 8 * row))
        record = json.loads(os.pread(rows, end - start, start))
        question, answer = (at(record, key, f"row {row} of {self.name}") for key in (self.question, self.answer))
        if not isinstance(question, str):
            raise ValueError(f"{self.question} in row {row} of {self.name} is no text")
        return question, answer


@functools.lru_cache(maxsize=64)
def opened(rows: str, index: str) -> tuple[int, int, int]:
    return os.open(rows, os.O_RDONLY), os.open(index, os.O_RDONLY), os.path.getsize(index) // 8 - 1


def at(record: Any, key: str, where: str) -> Any:
    value = record
    for part in key.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"{where} has no {key}") from None
    if value is None:
        raise ValueError(f"{key} is null in {where}")
    return value


def index_table(name: str, spec: TableConfig, recipe: Path, scratch: Path) -> tuple[Table, str]:
    """The table of one source, ready for look-ups, and the digest of its rows. Its index lies in ``scratch``."""
    place, files = recipe / spec.path, table_files(spec, recipe)
    file_name = "table-" + hashlib.sha256(name.encode()).hexdigest()[:16]  # a name may hold any letter
    rows, digest = scratch / f"{file_name}.jsonl", hashlib.sha256()
    offsets = array.array("Q", [0])
    try:
        copy = None if [file.suffix for file in files] == [".jsonl"] else rows.open("wb")
        with Progress(f"table {name}: read", sum(file.stat().st_size for file in files)) as progress:
            for line, size in (row for file in files for row in table_rows(file, spec)):
                digest.update(line)
                offsets.append(offsets[-1] + len(line))
                if copy:
                    copy.write(line)
                progress.add(size, 1)
        if copy:
            copy.close()
    except OSError as error:
        raise unreadable(name, error.filename or place, error.strerror or str(error)) from error
    if len(offsets) == 1:
        raise unreadable(name, place, "it has no rows")
    index = scratch / f"{file_name}-{digest.hexdigest()[:16]}.index"  # a worker may outlive this table
    with index.open("wb") as out:
        offsets.tofile(out)
    table = Table(name, str(rows if copy else files[0]), str(index), spec.template, spec.question, spec.answer)
    return table, digest.hexdigest()


def table_files(spec: TableConfig, recipe: Path) -> list[Path]:
    place = recipe / spec.path
    return sorted(p for p in place.iterdir() if p.suffix in (".jsonl", ".parquet")) if place.is_dir() else [place]


def unreadable(name: str, place: object, why: str) -> RecipeError:
    return RecipeError(
        f"cannot read the source table of {name}, {place}: {why}.\n"
        f"Bring the table there, or set sources.{name}.path=FILE."
    )


def table_rows(file: Path, spec: TableConfig) -> Iterator[tuple[bytes, float]]:
    """The rows as lines of JSON, each with its share of the file in bytes."""
    if file.suffix == ".parquet":
        yield from parquet_rows(file, spec)
        return
    with file.open("rb", buffering=1 << 20) as lines:
        for number, line in enumerate(lines, 1):
            try:
                shards.read_json(line)
            except ValueError as error:
                raise RecipeError(f"{file}:{number}: not JSON ({error}).\nMend that row of the table.") from error
            yield line, len(line)


def parquet_rows(file: Path, spec: TableConfig) -> Iterator[tuple[bytes, float]]:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RecipeError(
            f"{file} is Parquet, and pyarrow, which reads it, is not installed here.\n"
            "Add pyarrow to pip_extras or the image, or bring the table as JSONL."
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        share = file.stat().st_size / max(1, table.metadata.num_rows)
        columns = sorted({spec.question.split(".")[0], spec.answer.split(".")[0]})
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield json.dumps(row).encode() + b"\n", share
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise RecipeError(f"cannot read {file} as Parquet: {error}\nBring the table as JSONL.") from error
