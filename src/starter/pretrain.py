"""Pretraining: token ids in Megatron's format, prepared by data/prep/pretrain → a model folder for the next stage."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from starter import manifest, training
from starter.chat import fingerprint
from starter.config import PretrainConfig, RecipeError
from starter.megatron import TokenBlend, read_blend
from starter.training import Data


def main(recipe: Path) -> NoReturn:
    training.main(recipe, PretrainConfig, load, chat=False)


def run(recipe: Path, argv: list[str]) -> int:
    return training.run(recipe, argv, PretrainConfig, load, chat=False)


def load(cfg: PretrainConfig, recipe: Path, tokenizer: PreTrainedTokenizerBase) -> Data:
    path, length = recipe / cfg.data.blend, cfg.data.seq_length
    owned = manifest.owner(path)
    prepared_with = owned[1].get("tokenizer") if owned else None
    if prepared_with and prepared_with != fingerprint(tokenizer):
        raise RecipeError(
            f"{path} was prepared with tokenizer {prepared_with}, this recipe has {fingerprint(tokenizer)}.\n"
            "Run data/prep/pretrain with the tokenizer of this recipe."
        )
    parts = read_blend(path)
    if cfg.data.verify:
        for prefix in [path, *(path.parent / prefix for entries in parts.values() for prefix in entries[1::2])]:
            training.verify(prefix)
    train = TokenBlend(path, "train", length)
    val = TokenBlend(path, "valid", length) if parts.get("valid") else None
    return Data(train, val, cfg.data.blend, train.digest())
