"""Data for reinforcement learning: prompts with what their answers are checked against, as JSONL.

Rows are copied as they stand, byte for byte. A row with ``_hf_placeholder`` = {row, question_template} is filled from
the row of a source table that its field ``dataset`` names: the question goes into ``question`` and, in the template,
into ``responses_create_params.input``, the answer into ``expected_answer``; its other fields stay as they are written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from starter import prep, shards
from starter.config import RecipeError, build
from starter.files import BLOCK
from starter.prep import Built, PrepConfig, Split
from starter.progress import Progress
from starter.shards import Held, Lowest, Range, Scan
from starter.tables import Table, TableConfig, index_table

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


def quick_json() -> Callable[[bytes], Any] | None:
    """A faster reader of JSON, where there is one. What it refuses, ``strict_json`` decides."""
    try:
        import orjson

        return orjson.loads
    except ImportError:
        pass
    try:
        from pydantic_core import from_json

        return functools.partial(from_json, allow_inf_nan=False)
    except ImportError:
        return None


QUICK = quick_json()


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
    if not isinstance(template, dict) or not isinstance(template.get("prefix", ""), str):
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


def first_value(answer: Any) -> str:
    """A source's answer as JSON: texts hold JSON themselves, and of a list or table the first value counts."""
    if not isinstance(answer, str):
        return spelled(answer)
    try:
        decoded = shards.DECODER.decode(answer)
    except (ValueError, RecursionError):
        return spelled(answer)
    if isinstance(decoded, dict) and decoded:
        return next(iter(members(answer).values()))
    if isinstance(decoded, list) and decoded:
        start = skip(answer, skip(answer, 0) + 1)
        return answer[start : shards.DECODER.raw_decode(answer, start)[1]]  # as written: 0.10 stays 0.10
    return answer.strip()


# ---------------------------------------------------------------- scan


@dataclass(frozen=True)
class RowScanner:
    """Checks each row of a range and fills what is to be filled; with a copy of the range only where a row changes."""

    scratch: str
    seed: int
    holdout: int
    tables: dict[str, Table]
    required: tuple[str, ...]

    def __call__(self, part: Range) -> Scan:
        prefix, keys, lowest, rows = shards.seed_prefix(self.seed), hashlib.sha256(), Lowest(self.holdout), 0
        sha256, quick, required = hashlib.sha256, QUICK or shards.strict_json, self.required
        file, at = shards.open_at(part)
        start, written, copy = at, 0, None
        with file:
            for line in file:
                if at >= part.end:
                    break
                place, size = at, len(line)
                at += size
                try:
                    row = quick(line)
                except ValueError:
                    row = None
                if type(row) is not dict or line[-1] != 10:
                    if line.isspace():
                        copy = copy or self.copy(part, start, place)
                        continue
                    row = shards.parse_row(part, place, line)
                    if line[-1] != 10:
                        line, copy = line + b"\n", copy or self.copy(part, start, place)
                key = sha256(prefix + line).digest()
                keys.update(key)
                if row.get(PLACEHOLDER) is not None:
                    copy = copy or self.copy(part, start, place)
                    line = self.filled(part, place, line, row)
                    row = row | {"question": 0, "expected_answer": 0, "responses_create_params": 0}
                for name in required:
                    if name not in row:
                        raise shards.bad_row(part, place, f"the row has no {name}", "Add it, or set required.")
                if copy:
                    copy.write(line)
                if key < lowest.bound:
                    lowest.add(key, written, len(line))
                written += len(line)
                rows += 1
        begin = start
        if copy:
            copy.close()
            begin = 0
        found = [(key, begin + offset, length) for key, offset, length in lowest.cut()]
        source = copy.name if copy else str(part.shard.path)
        return Scan(rows, keys.digest(), found, source, begin, begin + written)

    def filled(self, part: Range, place: int, line: bytes, row: dict[str, Any]) -> bytes:
        try:
            return fill(line, row, self.tables)
        except ValueError as error:
            raise shards.bad_row(part, place, f"cannot fill the row: {error}", "Mend the row, or sources.") from error

    def copy(self, part: Range, start: int, end: int) -> BinaryIO:
        """A file for the rows of this range, with those that went before."""
        name = hashlib.sha256(f"{part.shard.path}:{part.start}".encode()).hexdigest()[:16]
        copy = open(os.path.join(self.scratch, f"rows-{name}-{os.getpid()}"), "wb", buffering=BLOCK)
        with part.shard.path.open("rb") as file:
            file.seek(start)
            while start < end and (block := file.read(min(BLOCK, end - start))):
                copy.write(block)
                start += len(block)
        return copy


class RLPrep:
    mode, range_size = "rl", 1 << 25
    takes: tuple[str, ...] = ()

    def __init__(self, cfg: RLPrepConfig, recipe: Path) -> None:
        self.cfg, self.recipe, self.tables = cfg, recipe, dict[str, Table]()
        self.digests: dict[str, str] = {}

    def begin(self, scratch: Path) -> None:
        for name, values in self.cfg.sources.items():
            spec = build(TableConfig, values, f"sources.{name}")
            if spec.template not in TEMPLATES:
                raise RecipeError(f"sources.{name}.template is {spec.template}.\nUse {' or '.join(TEMPLATES)}.")
            self.tables[name], self.digests[name] = index_table(name, spec, self.recipe, scratch)

    def ingredients(self) -> Any:
        return [self.cfg.sources, self.digests, self.cfg.required]

    def scanner(self, scratch: Path, check: bool) -> Callable[[Range], Scan]:
        if not check:
            return functools.partial(shards.scan_keys, seed=self.cfg.seed, holdout=0)
        required = tuple(map(str, self.cfg.required))
        return RowScanner(str(scratch), self.cfg.seed, self.cfg.holdout, self.tables, required)

    def build(self, split: Split, ranges: list[Range], scans: list[Scan], held: list[Held], folder: Path) -> Built:
        """``<part>-split.jsonl`` in the order of the shards without what is held out, which lies in val by its keys."""
        name = f"{split.part}-split.jsonl"
        rows = sum(scan.rows for scan in scans) - len(held)
        files = {name: {"rows": rows, **copy_rows(folder / name, remaining(scans, held), split.name)}}
        parts = {split.part: name}
        if split.part == "train":
            pieces = [(scans[row.scan].source, row.offset, row.offset + row.length) for row in held]
            files["val-split.jsonl"] = {"rows": len(held), **copy_rows(folder / "val-split.jsonl", pieces, split.name)}
            parts["val"] = "val-split.jsonl"
        return Built(parts, files)

    def finish(self, output: Path, manifest: dict[str, Any], splits: list[Split]) -> None:
        pass


# ---------------------------------------------------------------- build


def remaining(scans: list[Scan], held: list[Held]) -> list[tuple[str, int, int]]:
    """The pieces (file, start, end) of all ranges between the rows that are held out."""
    pieces = []
    by_scan: dict[int, list[Held]] = {}
    for row in held:
        by_scan.setdefault(row.scan, []).append(row)
    for i, scan in enumerate(scans):
        at = scan.start
        for row in sorted(by_scan.get(i, []), key=lambda row: row.offset):
            pieces.append((scan.source, at, row.offset))
            at = row.offset + row.length
        pieces.append((scan.source, at, scan.end))
    return [piece for piece in pieces if piece[1] < piece[2]]


def copy_rows(path: Path, pieces: list[tuple[str, int, int]], name: str) -> dict[str, Any]:
    """Write the pieces one after the other. The kernel copies them, and a thread hashes what has been written."""
    digest, total, place = hashlib.sha256(), 0, 0
    progress = Progress(f"{name}: write {path.name}", sum(end - start for _, start, end in pieces))
    with path.open("w+b", buffering=0) as file, ThreadPoolExecutor(1) as hasher:

        def hash_next(at: int, end: int) -> None:
            while at < end:
                block = os.pread(file.fileno(), min(BLOCK, end - at), at)
                digest.update(block)
                at += len(block)

        done = []
        for source, start, end in pieces:
            with open(source, "rb", buffering=0) as rows:
                while start < end:
                    size = copy_some(rows.fileno(), file.fileno(), start, min(CHUNK, end - start))
                    if not size:
                        raise RecipeError(f"{source} became shorter while it was read.\nWait until it is written.")
                    start, total = start + size, total + size
                    progress.add(size, 0)
                    if total - place >= CHUNK:
                        done.append(hasher.submit(hash_next, place, total))
                        place = total
        done.append(hasher.submit(hash_next, place, total))
        for part in done:
            part.result()
        os.fsync(file.fileno())
    progress.clear()
    return {"bytes": total, "sha256": digest.hexdigest()}


def copy_some(source: int, target: int, start: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, start)
    except (OSError, AttributeError):  # between some file systems; what is wrong otherwise, read and write will say
        return os.write(target, os.pread(source, min(size, BLOCK), start))
