"""Supervised fine-tuning: config and chat data → packed sequences → training → a model folder for the next stage."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from transformers import PreTrainedConfig

from starter import checkpoint, model
from starter.chat import Packed, load_packed, load_tokenizer
from starter.config import RecipeError, SFTConfig, parse_args
from starter.distributed import StopSignal, World, join, local_rank
from starter.trainer import Trainer


def main(recipe: Path) -> NoReturn:
    """Run with the arguments of this process. ``recipe`` is the folder that relative data paths start from.

    Exit codes: 0 done, 1 an error, 128 + N stopped by signal N with a checkpoint written.
    """
    try:
        code = run(recipe, sys.argv[1:])
    except RecipeError as error:
        if local_rank() == 0:  # every rank of a node comes to the same error
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code)


def run(recipe: Path, argv: list[str]) -> int:
    cfg = parse_args(SFTConfig, argv)
    output = Path(os.environ.get("NEMO_RUN_DIR", "."), cfg.output)
    world = join()
    quiet_libraries(world)
    resume_from = world.from_rank_0(checkpoint.newest_checkpoint(output / "checkpoints"))
    trainer, export = world.together(lambda: prepare(cfg, recipe, output, world, resume_from))
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
    cfg: SFTConfig, recipe: Path, output: Path, world: World, resume_from: Path | None
) -> tuple[Trainer, Callable[[], None]]:
    """What each rank does on its own: tokenizer, data, model, checkpoint. Returns also what exports the model."""
    tokenizer_name = cfg.model.tokenizer or cfg.model.path
    if not tokenizer_name:
        raise RecipeError("the config names no tokenizer.\nSet model.tokenizer=bytes or to a local folder.")
    tokenizer = load_tokenizer(tokenizer_name)
    config = model.model_config(cfg.model, tokenizer)
    dtype = model.stored_dtype(config)  # asked here, since loading the model overwrites it
    data = load_packed(recipe / cfg.data.train, cfg.data.seq_length, tokenizer)
    val = load_packed(recipe / cfg.data.val, cfg.data.seq_length, tokenizer) if cfg.data.val else None
    model.check_memory(config, world.device)
    torch.manual_seed(cfg.seed)
    network = model.load_model(cfg.model, config, weights=resume_from is None)
    trainer = Trainer(network, data, val, cfg.train, cfg.seed, output, fingerprint(cfg, recipe, data, config), world)
    trainer.resume(resume_from)

    def export() -> None:
        record = {"step": trainer.step, "tokenizer": tokenizer_name, "data": cfg.data.train}
        model.export_model(network, tokenizer, output / "model", dtype, record)

    return trainer, export


def quiet_libraries(world: World) -> None:
    """On the CPU, transformers recommends CUDA kernels; with many ranks, each warning comes many times."""
    transformers.logging.disable_progress_bar()
    if world.device.type == "cpu" or world.rank > 0:
        transformers.logging.set_verbosity_error()


def fingerprint(cfg: SFTConfig, recipe: Path, data: Packed, config: PreTrainedConfig) -> dict[str, str]:
    """What has to stay the same for a run to go on from a checkpoint: where it started, the data, the architecture."""
    return {
        "data.seq_length": str(cfg.data.seq_length),
        "data.train": "sha256 " + hashlib.sha256((recipe / cfg.data.train).read_bytes()).hexdigest()[:16],
        "the packed tokens": "sha256 " + hashlib.sha256(data.labels.numpy().tobytes()).hexdigest()[:16],
        "model.path": str(cfg.model.path),
        **model.architecture(config),
    }


def announce(trainer: Trainer) -> None:
    world, steps = trainer.world, trainer.cfg.steps
    trainer.say(
        f"{trainer.model.num_parameters():,} parameters, {world.size} ranks on {world.device.type}, "
        f"{len(trainer.data)} sequences of {trainer.data.input_ids.shape[1]} tokens"
    )
    if trainer.step < steps:
        trainer.say(f"resumed at step {trainer.step} of {steps}" if trainer.step else f"starting, {steps} steps")
    else:
        val_loss = f", val_loss {trainer.evaluate(trainer.val):.4f}" if trainer.val else ""
        trainer.say(f"resumed at step {trainer.step} of {steps}: nothing left to train{val_loss}")
