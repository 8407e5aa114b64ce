"""Supervised fine-tuning: chat data, prepared by data/prep/sft or packed now → a model folder for the next stage."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from starter import training
from starter.chat import load_packed
from starter.config import SFTConfig
from starter.training import Data


def main(recipe: Path) -> NoReturn:
    training.main(recipe, SFTConfig, load, chat=True)


def run(recipe: Path, argv: list[str]) -> int:
    return training.run(recipe, argv, SFTConfig, load, chat=True)


def load(cfg: SFTConfig, recipe: Path, tokenizer: PreTrainedTokenizerBase) -> Data:
    paths = [recipe / path for path in (cfg.data.train, cfg.data.val) if path]
    if cfg.data.verify:
        for path in paths:
            training.verify(path)
    train, *val = (load_packed(path, cfg.data.seq_length, tokenizer) for path in paths)
    return Data(train, val[0] if val else None, cfg.data.train, train.digest())
