"""Data for fine-tuning: chat in JSONL → token ids of one length with loss masks, in safetensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from starter import chat, prep, shards
from starter.config import RecipeError
from starter.files import sha256
from starter.prep import Built, PrepConfig, Split
from starter.shards import Held, Range, Scan


@dataclass(frozen=True, kw_only=True)
class SFTPrepConfig(PrepConfig):
    tokenizer: str  # "bytes" or a local folder
    seq_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_length < 2:
            raise RecipeError(f"seq_length is {self.seq_length}.\nGive the tokens of a sequence, as in seq_length=4096.")


def main(recipe: Path) -> NoReturn:
    prep.main(recipe, SFTPrepConfig, SFTPrep)


@functools.lru_cache(maxsize=2)
def tokenizer(name: str) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are many enough
    return chat.load_tokenizer(name)


@dataclass(frozen=True)
class Done:
    rows: int
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Packer:
    """Packs one range: all but the rows that are held out of it, and those by themselves."""

    held: dict[Range, frozenset[int]]
    names: dict[Range, str]
    folder: Path
    kept: str
    tokenizer: str
    seq_length: int

    def __call__(self, part: Range) -> Done:
        tokens, held, files, rows = tokenizer(self.tokenizer), self.held[part], {}, 0
        for where, wanted in ((self.kept, False), ("val", True)):
            if wanted and not held:
                continue
            packed = chat.pack(self.dialogues(part, held, wanted), self.seq_length, chat.pad_id(tokens))
            if len(packed):
                path = self.folder / where / f"{self.names[part]}.safetensors"
                chat.write_packed(path, packed, tokens)
                facts = {"rows": len(packed), "bytes": path.stat().st_size, "sha256": sha256(path)}
                files[f"{where}/{path.name}"] = facts
                rows += len(packed)
        return Done(rows, files)

    def dialogues(self, part: Range, held: frozenset[int], wanted: bool) -> Iterator[chat.Encoded]:
        for at, line in shards.lines(part):
            if (at in held) is wanted:
                shards.parse_row(part, at, line)
                try:
                    yield chat.encode(chat.parse_dialogue(line), tokenizer(self.tokenizer))
                except chat.BadRecordError as error:
                    raise shards.bad_row(part, at, error.what, error.fix) from error


class SFTPrep:
    mode, range_size = "sft", 1 << 24

    def __init__(self, cfg: SFTPrepConfig, recipe: Path) -> None:
        self.cfg = cfg

    def begin(self, scratch: Path) -> None:
        tokenizer(self.cfg.tokenizer)  # before the workers are forked off, which so need not load it

    def ingredients(self) -> Any:
        return [chat.fingerprint(tokenizer(self.cfg.tokenizer)), self.cfg.seq_length]

    def scanner(self, scratch: Path, check: bool) -> Callable[[Range], Scan]:
        return functools.partial(shards.scan_keys, seed=self.cfg.seed, holdout=self.cfg.holdout)

    def build(self, split: Split, ranges: list[Range], scans: list[Scan], held: list[Held], folder: Path) -> Built:
        parts = [split.part, "val"] if held else [split.part]
        for part in parts:
            (folder / part).mkdir()
        places = dict(zip(ranges, prep.held_places(held, scans), strict=True))
        names = {part: f"{i:05d}" for i, part in enumerate(ranges)}
        packer = Packer(places, names, folder, split.part, self.cfg.tokenizer, self.cfg.seq_length)
        done = prep.watched(f"{split.name}: pack", packer, ranges, self.cfg.workers)
        return Built({part: part for part in parts}, {name: f for one in done for name, f in one.files.items()})

    def finish(self, output: Path, manifest: dict[str, Any], splits: list[Split]) -> None:
        manifest["tokenizer"], manifest["seq_length"] = self.ingredients()
