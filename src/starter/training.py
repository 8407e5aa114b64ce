"""A training run from its config to its export, whatever the data: tokenizer, data, model, checkpoint, training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from starter import checkpoint, manifest, model
from starter.chat import load_tokenizer
from starter.config import PretrainConfig, RecipeError, SFTConfig, parse_args
from starter.distributed import StopSignal, World, join, local_rank
from starter.trainer import Sequences, Trainer

Config = TypeVar("Config", SFTConfig, PretrainConfig)


@dataclass(frozen=True)
class Data:
    train: Sequences
    val: Sequences | None
    name: str
    digest: str  # changes with the tokens


Load = Callable[[Config, Path, PreTrainedTokenizerBase], Data]


def main(recipe: Path, config: type[Config], load: Load[Config], chat: bool) -> NoReturn:
    """Run with the arguments of this process. ``recipe`` is the folder that relative data paths start from.

    Exit codes: 0 done, 1 an error, 128 + N stopped by signal N with a checkpoint written.
    """
    try:
        code = run(recipe, sys.argv[1:], config, load, chat)
    except RecipeError as error:
        if local_rank() == 0:  # every rank of a node comes to the same error
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code)


def run(recipe: Path, argv: list[str], config: type[Config], load: Load[Config], chat: bool) -> int:
    cfg = parse_args(config, argv)
    output = Path(os.environ.get("NEMO_RUN_DIR", "."), cfg.output)
    world = join()
    quiet_libraries(world)
    resume_from = world.from_rank_0(checkpoint.newest_checkpoint(output / "checkpoints"))

    def start() -> tuple[Trainer, Callable[[], None]]:
        return prepare(cfg, recipe, output, world, resume_from, load, chat)

    trainer, export = world.together(start)
    trainer.distribute()
    announce(trainer)
    stopped_by = trainer.fit(StopSignal())
    if stopped_by:
        trainer.say(f"{signal.Signals(stopped_by).name}: stopped after step {trainer.step}, checkpoint saved")
    elif world.rank == 0 and model.exported_step(output / "model") != trainer.step:
        export()
        trainer.say(f"model for the next stage in {output / 'model'}")
    trainer.close()
    return 128 + stopped_by if stopped_by else 0


def prepare(
    cfg: Config, recipe: Path, output: Path, world: World, resume_from: Path | None, load: Load[Config], chat: bool
) -> tuple[Trainer, Callable[[], None]]:
    """What each rank does on its own: tokenizer, data, model, checkpoint. Returns also what exports the model."""
    tokenizer_name = cfg.model.tokenizer or cfg.model.path
    if not tokenizer_name:
        raise RecipeError("the config names no tokenizer.\nSet model.tokenizer=bytes or to a local folder.")
    tokenizer = load_tokenizer(tokenizer_name, chat)
    config = model.model_config(cfg.model, tokenizer)
    dtype = model.stored_dtype(config)  # asked here, since loading the model overwrites it
    data = load(cfg, recipe, tokenizer)
    model.check_memory(config, world.device)
    torch.manual_seed(cfg.seed)
    network = model.load_model(cfg.model, config, weights=resume_from is None)
    # What has to stay the same for a run to go on from a checkpoint: where it started, the data, the architecture.
    fingerprint = {
        "data.seq_length": str(cfg.data.seq_length),
        "data.train": f"sha256 {data.digest[:16]}",
        "model.path": str(cfg.model.path),
        **model.architecture(config),
    }
    trainer = Trainer(network, data.train, data.val, cfg.train, cfg.seed, output, fingerprint, world)
    trainer.resume(resume_from)

    def export() -> None:
        record = {"step": trainer.step, "tokenizer": tokenizer_name, "data": data.name}
        model.export_model(network, tokenizer, output / "model", dtype, record)

    return trainer, export


def verify(path: Path) -> None:
    """Compare prepared data with the SHA-256 in its manifest, once on each node."""
    if local_rank() == 0:
        manifest.check(path)


def quiet_libraries(world: World) -> None:
    """On the CPU, transformers recommends CUDA kernels; with many ranks, each warning comes many times."""
    transformers.logging.disable_progress_bar()
    if world.device.type == "cpu" or world.rank > 0:
        transformers.logging.set_verbosity_error()


def announce(trainer: Trainer) -> None:
    world, steps = trainer.world, trainer.cfg.steps
    trainer.say(
        f"{trainer.model.num_parameters():,} parameters, {world.size} ranks on {world.device.type}, "
        f"{len(trainer.data)} sequences of {trainer.data.seq_length} tokens"
    )
    if trainer.step < steps:
        trainer.say(f"resumed at step {trainer.step} of {steps}" if trainer.step else f"starting, {steps} steps")
    else:
        val_loss = f", val_loss {trainer.evaluate(trainer.val):.4f}" if trainer.val else ""
        trainer.say(f"resumed at step {trainer.step} of {steps}: nothing left to train{val_loss}")
