"""Data for pretraining: documents in JSONL → token ids in Megatron's indexed format, and the blend that names them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from starter import chat, megatron, prep, shards
from starter.dialogue import HALF_A_PAIR, is_unicode
from starter.files import sha256, write_json
from starter.prep import Built, Done, PrepConfig, Split, Task
from starter.shards import Held, Range


@dataclass(frozen=True, kw_only=True)
class PretrainPrepConfig(PrepConfig):
    tokenizer: str  # "bytes" or a local folder


def main(recipe: Path) -> NoReturn:
    prep.main(recipe, PretrainPrepConfig, PretrainPrep)


@functools.lru_cache(maxsize=2)
def tokenizer(name: str) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are many enough
    return chat.load_tokenizer(name, chat=False, key="tokenizer")


def tokenize(task: Task, tokenizer_name: str) -> Done:
    """One range as a pair of files, and another for what is held out of it. A document ends with the end mark."""
    tokens = tokenizer(tokenizer_name)
    end, field = chat.end_id(tokens), task.part.shard.dataset.text_field
    code = megatron.token_type(chat.id_count(tokens))
    writers: dict[str, megatron.Writer] = {}
    rows = 0
    for at, line in shards.lines(task.part):
        text = shards.parse_row(task.part, at, line).get(field)
        if not isinstance(text, str):
            raise shards.bad_row(task.part, at, f"{field} is no text", "Mend the row, or text_field in the blend.")
        if not is_unicode(text):
            raise shards.bad_row(task.part, at, f"{field} {HALF_A_PAIR[0]}", HALF_A_PAIR[1])
        where = "val" if at in task.held else task.kept
        if where not in writers:
            writers[where] = megatron.Writer(task.folder / where / task.name, code)
        writers[where].add([*chat.text_ids(text, tokens), end])
        rows += 1
    files = {f"{where}/{name}": facts for where, w in writers.items() for name, facts in w.close().items()}
    return Done(rows, files)


class PretrainPrep:
    mode, range_size = "pretrain", 1 << 26
    takes: tuple[str, ...] = ("weight", "text_field")
    look = staticmethod(shards.scan)

    def __init__(self, cfg: PretrainPrepConfig, recipe: Path) -> None:
        self.cfg = cfg

    def begin(self, scratch: Path) -> None:
        tokenizer(self.cfg.tokenizer)  # before the workers are forked off, which so need not load it

    def ingredients(self) -> Any:
        return chat.fingerprint(tokenizer(self.cfg.tokenizer))

    def build(self, split: Split, ranges: list[Range], scans: list[Any], held: list[Held], folder: Path) -> Built:
        work = functools.partial(tokenize, tokenizer_name=self.cfg.tokenizer)
        return prep.build_parts("tokenize", work, split, ranges, held, folder, self.cfg.workers)

    def finish(self, output: Path, manifest: dict[str, Any], splits: list[Split]) -> None:
        """Write blend.json: each data set's weight, shared out among its files by their sizes."""
        weights = {(split.name, s.dataset.name): s.dataset.weight for split in splits for s in split.shards}
        sizes: dict[tuple[str, str, str], int] = {}
        pairs = []
        for path, facts in manifest["files"].items():
            split, part, name = path.removesuffix(".bin").split("/")
            if path.endswith(".bin"):
                key = (split, part, name.rpartition("-")[0])
                pairs.append((key, path.removesuffix(".bin"), facts["bytes"]))
                sizes[key] = sizes.get(key, 0) + facts["bytes"]
        blend: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        for key, prefix, size in pairs:
            weight = weights[key[0], key[2]] * size / max(1, sizes[key])
            blend[{"val": "valid"}.get(key[1], key[1])] += [f"{weight:.9g}", prefix]
        path = output / "blend.json"
        write_json(path, {name: entries for name, entries in blend.items() if entries})
        manifest["blend"] = path.name
        manifest["tokenizer"] = self.ingredients()
        facts = {"rows": sum(map(len, blend.values())) // 2, "bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest["files"][path.name] = facts
