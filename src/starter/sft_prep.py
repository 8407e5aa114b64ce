"""Data for fine-tuning: chat in JSONL → token ids of one length with loss masks, in safetensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from starter import chat, prep, shards
from starter.config import RecipeError
from starter.dialogue import BadRecordError, parse_dialogue
from starter.files import sha256
from starter.manifest import say
from starter.prep import Built, Done, PrepConfig, Split, Task
from starter.shards import Held, Range
from starter.template import Encoded, which_template


@dataclass(frozen=True, kw_only=True)
class SFTPrepConfig(PrepConfig):
    tokenizer: str  # "bytes" or a local folder
    seq_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_length < 2:
            raise RecipeError(f"seq_length is {self.seq_length}.\nGive its tokens, as in seq_length=4096.")


def main(recipe: Path) -> NoReturn:
    prep.main(recipe, SFTPrepConfig, SFTPrep)


@functools.lru_cache(maxsize=2)
def tokenizer(name: str) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are many enough
    return chat.load_tokenizer(name, key="tokenizer")


def pack(task: Task, tokenizer_name: str, seq_length: int) -> Done:
    """One range as packed sequences, and what is held out of it as others."""
    tokens, files, rows = tokenizer(tokenizer_name), {}, 0
    for where, held in ((task.kept, False), ("val", True)):
        if held and not task.held:
            continue
        packed = chat.pack(dialogues(task, held, tokens), seq_length, chat.pad_id(tokens))
        if len(packed):
            path = task.folder / where / f"{task.name}.safetensors"
            chat.write_packed(path, packed, tokens)
            files[f"{where}/{path.name}"] = {"rows": len(packed), "bytes": path.stat().st_size, "sha256": sha256(path)}
            rows += len(packed)
    return Done(rows, files)


def dialogues(task: Task, held: bool, tokens: Any) -> Iterator[Encoded]:
    for at, line in shards.lines(task.part):
        if (at in task.held) is held:
            shards.parse_row(task.part, at, line)
            try:
                yield from chat.encode(parse_dialogue(line), tokens)
            except BadRecordError as error:
                raise shards.bad_row(task.part, at, error.what, error.fix) from error


class SFTPrep:
    mode, range_size = "sft", 1 << 24
    takes: tuple[str, ...] = ()
    look = staticmethod(shards.scan)

    def __init__(self, cfg: SFTPrepConfig, recipe: Path) -> None:
        self.cfg = cfg

    def begin(self, scratch: Path) -> None:
        tokens = tokenizer(self.cfg.tokenizer)  # before the workers are forked off, which so need not load it
        say(which_template(tokens))

    def ingredients(self) -> Any:
        return [chat.fingerprint(tokenizer(self.cfg.tokenizer), chat=True), self.cfg.seq_length]

    def build(self, split: Split, ranges: list[Range], scans: list[Any], held: list[Held], folder: Path) -> Built:
        work = functools.partial(pack, tokenizer_name=self.cfg.tokenizer, seq_length=self.cfg.seq_length)
        return prep.build_parts("pack", work, split, ranges, held, folder, self.cfg.workers)

    def finish(self, output: Path, manifest: dict[str, Any], splits: list[Split]) -> None:
        manifest["tokenizer"], manifest["seq_length"] = self.ingredients()
