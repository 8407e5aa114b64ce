"""Data for reinforcement learning: prompts with what their answers are checked against, as JSONL.

Rows are copied as they stand, byte for byte. A row with ``_hf_placeholder`` = {row, question_template} is filled from
the row of a source table that its field ``dataset`` names: the question goes into ``question`` and, in the template,
into ``responses_create_params.input``, the answer into ``expected_answer``; its other fields stay as they are written.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from starter import prep, shards
from starter.config import RecipeError, build
from starter.files import BLOCK
from starter.prep import Built, PrepConfig, Split
from starter.progress import Progress
from starter.shards import Held, Range, Scan
from starter.tables import Table, TableConfig, index_table, table_files

PLACEHOLDER = "_hf_placeholder"
CHUNK = 1 << 23  # bytes that are copied before they are hashed
SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, kw_only=True)
class RLPrepConfig(PrepConfig):
    sources: dict[str, Any] = field(default_factory=dict)  # a row's `dataset` -> where its source table is
    required: list[Any] = field(default_factory=lambda: ["responses_create_params"])  # fields that every row must have


def main(recipe: Path) -> NoReturn:
    prep.main(recipe, RLPrepConfig, RLPrep)


# ---------------------------------------------------------------- rows


def members(text: str) -> dict[str, str]:
    """The members of a JSON object, each value as it is written. Of two with one name, the last counts."""
    found: dict[str, str] = {}
    at = skip(text, skip(text, 0) + 1)
    while text[at] != "}":
        name, at = json.decoder.scanstring(text, at + 1, True)  # type: ignore[attr-defined]
        start = skip(text, skip(text, at) + 1)
        _, end = shards.DECODER.raw_decode(text, start)
        found[name] = text[start:end]
        at = skip(text, end)
        if text[at] == ",":
            at = skip(text, at + 1)
    return found


def skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    assert match
    return match.end()


def spelled(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair
        text = json.dumps(value)
    return text


def joined(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f"{spelled(name)}: {value}" for name, value in fields.items()) + "}"


def fill(line: bytes, row: dict[str, Any], tables: dict[str, Table]) -> bytes:
    """The row without its placeholder and with what it stands for. Raises ValueError that says what is wrong."""
    place, name = row[PLACEHOLDER], row.get("dataset")
    if not isinstance(place, dict) or "row" not in place or "question_template" not in place:
        raise ValueError(f"{PLACEHOLDER} must have row and question_template")
    if not isinstance(name, str) or name not in tables:
        raise ValueError(f"its dataset is {name!r}, and sources has {', '.join(sorted(tables)) or 'none'}")
    source, answer = tables[name].question_and_answer(place["row"])
    question, prompt = TEMPLATES[tables[name].template](source, place["question_template"])
    if row.get("responses_create_params") is not None and not isinstance(row["responses_create_params"], dict):
        raise ValueError("its responses_create_params is no table")
    fields = members(line.decode("utf-8"))
    del fields[PLACEHOLDER]
    fields["question"] = spelled(question)
    fields["expected_answer"] = first_value(answer)
    params = members(fields["responses_create_params"]) if row.get("responses_create_params") else {}
    params["input"] = spelled([{"role": "user", "content": prompt}])
    fields["responses_create_params"] = joined(params)
    return joined(fields).encode("utf-8") + b"\n"


def fill_dapo(source: str, template: Any) -> tuple[str, str]:
    """The source's own first and last paragraph give way to those of the template."""
    ends = [template.get(end, "") for end in ("prefix", "suffix")] if isinstance(template, dict) else [None]
    if not all(isinstance(end, str) for end in ends):
        raise ValueError("its question_template must be a table of prefix and suffix")
    paragraphs = source.split("\n\n")
    bare = "\n\n".join(paragraphs[1:-1]) if len(paragraphs) > 2 else source
    prompt = f"{template.get('prefix', '')}{bare}{template.get('suffix', '')}".rstrip("\n")
    return prompt, prompt


def fill_skywork(source: str, template: Any) -> tuple[str, str]:
    if not isinstance(template, str) or "{question}" not in template:
        raise ValueError("its question_template must be a text with {question}")
    return source, template.replace("{question}", source)


TEMPLATES = {"dapo": fill_dapo, "skywork": fill_skywork}


def not_a_number(name: str) -> Any:
    raise ValueError(f"{name} is a text")


NUMBERS_ONLY = json.JSONDecoder(parse_constant=not_a_number)  # the answer Infinity stays the text it is


def first_value(answer: Any) -> str:
    """A source's answer as JSON: texts hold JSON themselves, and of a list or table the first value counts."""
    if not isinstance(answer, str):
        return spelled(answer)
    try:
        decoded = NUMBERS_ONLY.decode(answer)
    except (ValueError, RecursionError):
        return spelled(answer)
    if isinstance(decoded, dict) and decoded:
        return next(iter(members(answer).values()))
    if isinstance(decoded, list) and decoded:
        start = skip(answer, skip(answer, 0) + 1)
        return answer[start : shards.DECODER.raw_decode(answer, start)[1]]  # as written: 0.10 stays 0.10
    return answer.strip()


# ---------------------------------------------------------------- ranges


def quick_check(required: tuple[str, ...]) -> Callable[[bytes], dict[str, Any]] | None:
    """A faster look at a row, where pydantic is: its placeholder, once it is known to be JSON and to have its fields.

    It raises ValueError for all else, and for some rows that are sound: those the slower way decides.
    """
    try:
        from pydantic_core import SchemaValidator, core_schema
    except ImportError:
        return None
    table = core_schema.typed_dict_schema({}, extra_behavior="ignore")  # which builds none of what it ignores
    anything = core_schema.union_schema([table, core_schema.any_schema()], mode="left_to_right")
    fields = {name: core_schema.typed_dict_field(anything) for name in required}
    fields[PLACEHOLDER] = core_schema.typed_dict_field(core_schema.any_schema(), required=False)
    return SchemaValidator(core_schema.typed_dict_schema(fields, extra_behavior="ignore")).validate_json


def slow_check(line: bytes) -> dict[str, Any]:
    raise ValueError


@dataclass(frozen=True)
class Checked(Scan):
    """A range that was looked at: its rows stand in ``source`` from ``start`` to ``end``, and ``moved`` tells where
    those of ``lowest`` begin there that do not begin where they did in the shard."""

    source: str
    start: int
    end: int
    moved: dict[int, int]

    def spans(self, places: Iterable[int]) -> Iterator[tuple[int, int, int]]:
        """Of rows to hold out: the place in the shard, and begin and end in the source."""
        with open(self.source, "rb") as source:
            for place in sorted(places):
                begin = self.moved.get(place, place)
                source.seek(begin)
                yield place, begin, begin + len(source.readline())


@dataclass(frozen=True)
class Checker:
    """Checks each row and fills what is to be filled."""

    scratch: str
    tables: dict[str, Table]
    required: tuple[str, ...]

    def __call__(self, part: Range, seed: int, holdout: int) -> Checked:
        rows = Rows(self, part)
        found = shards.scan(part, seed, holdout, rows.visit)
        return rows.checked(found)

    def changed(self, part: Range, place: int, line: bytes) -> bytes:
        """The row as it is to be written, or nothing for a blank line. Raises what names file and line."""
        if shards.blank(line):
            return b""
        row = shards.parse_row(part, place, line)
        if not line.endswith(b"\n"):
            line += b"\n"
        if row.get(PLACEHOLDER) is not None:
            try:
                line = fill(line, row, self.tables)
            except ValueError as error:
                raise shards.bad_row(part, place, f"cannot fill the row: {error}", "Mend it, or sources.") from error
            row = row | {"question": 0, "expected_answer": 0, "responses_create_params": 0}
        for name in self.required:
            if name not in row:
                raise shards.bad_row(part, place, f"the row has no {name}", "Add it, or set required.")
        return line


class Rows:
    """The rows of a range, one after the other: in the shard, or from the first that changes on in a copy."""

    def __init__(self, checker: Checker, part: Range) -> None:
        self.checker, self.part, self.quick = checker, part, quick_check(checker.required) or slow_check
        self.start, self.end = -1, part.start  # of the lines seen, in the shard
        self.copy: BinaryIO | None = None
        self.places, self.offsets = array("q"), array("q")  # of the rows in the copy: there, and in the shard

    def visit(self, place: int, line: bytes) -> None:
        if self.start < 0:
            self.start = place
        self.end = place + len(line)
        try:
            plain = line[-1] == shards.NEWLINE and self.quick(line).get(PLACEHOLDER) is None
        except ValueError:
            plain = False
        if plain and not self.copy:
            return
        row = line if plain else self.checker.changed(self.part, place, line)
        if row == line and not self.copy:
            return
        self.copy = self.copy or self.begin_copy(place)
        self.places.append(place)
        self.offsets.append(self.copy.tell())
        self.copy.write(row)

    def begin_copy(self, end: int) -> BinaryIO:
        """A file for the rows of this range, with those that went before."""
        name = hashlib.sha256(f"{self.part.shard.path}:{self.part.start}".encode()).hexdigest()[:16]
        copy = open(os.path.join(self.checker.scratch, f"rows-{name}-{os.getpid()}"), "wb", buffering=BLOCK)
        with self.part.shard.path.open("rb") as file:
            file.seek(self.start)
            at = self.start
            while at < end and (block := file.read(min(BLOCK, end - at))):
                copy.write(block)
                at += len(block)
        return copy

    def checked(self, found: Scan) -> Checked:
        start, end, source, moved = max(self.start, self.part.start), self.end, str(self.part.shard.path), {}
        if self.copy:
            moved = {place: self.moved(place) for _, place in found.lowest}
            start, end, source = 0, self.copy.tell(), self.copy.name
            self.copy.close()
        return Checked(found.rows, found.digest, found.lowest, source, start, max(start, end), moved)

    def moved(self, place: int) -> int:
        i = bisect.bisect_left(self.places, place)
        return self.offsets[i] if i < len(self.places) and self.places[i] == place else place - self.start


# ---------------------------------------------------------------- prepare


class RLPrep:
    mode, range_size = "rl", 1 << 24
    takes: tuple[str, ...] = ()

    def __init__(self, cfg: RLPrepConfig, recipe: Path) -> None:
        self.cfg, self.recipe, self.tables, self.scratch = cfg, recipe, dict[str, Table](), recipe
        self.digests: dict[str, str] = {}
        self.read_from: dict[Path, tuple[int, int, int]] = {}

    def begin(self, scratch: Path) -> None:
        self.scratch = scratch
        for name, values in self.cfg.sources.items():
            spec = build(TableConfig, values, f"sources.{name}")
            if spec.template not in TEMPLATES:
                raise RecipeError(f"sources.{name}.template is {spec.template}.\nUse {' or '.join(TEMPLATES)}.")
            self.read_from |= {file: prep.stamp(file) for file in table_files(spec, self.recipe) if file.exists()}
            self.tables[name], self.digests[name] = index_table(name, spec, self.recipe, scratch)

    def look(self, part: Range, seed: int, holdout: int) -> Checked:
        return Checker(str(self.scratch), self.tables, tuple(map(str, self.cfg.required)))(part, seed, holdout)

    def ingredients(self) -> Any:
        tables = {name: (table.template, table.question, table.answer) for name, table in self.tables.items()}
        return [tables, self.digests, self.cfg.required]

    def build(self, split: Split, ranges: list[Range], scans: list[Any], held: list[Held], folder: Path) -> Built:
        """``<part>-split.jsonl`` in the order of the shards without what is held out, which lies in val by its keys."""
        place: dict[Held, tuple[str, int, int]] = {}
        name, rows = f"{split.part}-split.jsonl", 0
        size = sum(part.end - part.start for part in ranges)
        with Progress(f"{split.name}: write", size) as progress, Copier(folder / name) as copier:
            for i, (checked, places) in enumerate(zip(scans, prep.held_places(ranges, held), strict=True)):
                at = checked.start
                for was, begin, end in checked.spans(places):
                    copier.copy(checked.source, at, begin)
                    place[Held(i, was)], at = (checked.source, begin, end), end
                copier.copy(checked.source, at, checked.end)
                rows += checked.rows
                progress.add(ranges[i].end - ranges[i].start, checked.rows)
        for file, was in self.read_from.items():
            if prep.stamp(file) != was:
                raise RecipeError(f"{file} changed while rows were filled from it.\nWait until it is written.")
        files = {name: {"rows": rows - len(held), **copier.facts}}
        if split.part != "train":
            return Built({split.part: name}, files)
        with Copier(folder / "val-split.jsonl") as copier:
            for row in held:
                copier.copy(*place[row])
        files["val-split.jsonl"] = {"rows": len(held), **copier.facts}
        return Built({"train": name, "val": "val-split.jsonl"}, files)

    def finish(self, output: Path, manifest: dict[str, Any], splits: list[Split]) -> None:
        pass


class Copier:
    """A file that pieces of others are copied to, by the kernel, while a thread hashes what has been written."""

    def __init__(self, path: Path) -> None:
        self.file, self.digest, self.size, self.hashed = path.open("w+b", buffering=0), hashlib.sha256(), 0, 0
        self.thread, self.waiting = ThreadPoolExecutor(1), list[Future[None]]()
        self.buffer, self.facts = memoryview(bytearray(BLOCK)), dict[str, Any]()

    def copy(self, source: str, start: int, end: int) -> None:
        with open(source, "rb", buffering=0) as rows:
            while start < end:
                size = copy_some(rows.fileno(), self.file.fileno(), start, min(CHUNK, end - start))
                if not size:
                    raise RecipeError(f"{source} became shorter while it was read.\nWait until it is written.")
                start, self.size = start + size, self.size + size
                if self.size - self.hashed >= CHUNK:
                    self.hash_rest()

    def hash_rest(self) -> None:
        self.waiting.append(self.thread.submit(self.hash, self.hashed, self.size))
        self.hashed = self.size

    def hash(self, begin: int, end: int) -> None:
        at = begin
        while at < end:
            size = os.preadv(self.file.fileno(), [self.buffer[: end - at]], at)
            self.digest.update(self.buffer[:size])
            at += size
        os.posix_fadvise(self.file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)  # begins to write it out

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.hash_rest()
            if kind is None:
                os.fsync(self.file.fileno())
            for part in self.waiting:
                part.result()
            self.facts = {"bytes": self.size, "sha256": self.digest.hexdigest()}
        finally:
            self.thread.shutdown(cancel_futures=True)
            self.file.close()


def copy_some(source: int, target: int, start: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, start)
    except (OSError, AttributeError):  # between some file systems; what is wrong otherwise, read and write will say
        return os.write(target, os.pread(source, min(size, BLOCK), start))
