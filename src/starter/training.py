"""A training run from its config to its export, whatever the data: tokenizer, data, model, checkpoint, training."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from starter import checkpoint, manifest, model
from starter.chat import load_tokenizer
from starter.config import ModelConfig, PretrainConfig, RecipeError, SFTConfig, parse_args
from starter.distributed import StopSignal, World, join, local_rank
from starter.files import only_run, write_json
from starter.run import Run
from starter.template import which_template
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
    guarded(lambda: run(recipe, sys.argv[1:], config, load, chat))


def guarded(work: Callable[[], int]) -> NoReturn:
    """End the process with the code that ``work`` returns; an error of ours is told in its two lines."""
    try:
        code = work()
    except RecipeError as error:
        if local_rank() == 0:  # every rank of a node comes to the same error
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code)


def run(recipe: Path, argv: list[str], config: type[Config], load: Load[Config], chat: bool) -> int:
    cfg = parse_args(config, argv)
    output = output_folder(cfg.output)
    world = join()
    quiet_libraries(world)
    with held(output, world):
        resume_from = world.from_rank_0(checkpoint.newest_checkpoint(output / "checkpoints"))
        return conclude(
            *world.together(lambda: prepare(cfg, recipe, output, world, resume_from, load, chat)), output
        )


@contextlib.contextmanager
def held(output: Path, world: World) -> Iterator[None]:
    """Hold the folder against a second job: both would write one set of checkpoints, and one model would be lost."""
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            world.together(lambda: stack.enter_context(only_run(output, wait=False)))
        else:
            world.together(lambda: None)
        yield


def output_folder(output: str) -> Path:
    return Path(os.environ.get("NEMO_RUN_DIR", "."), output)


def conclude(trainer: Run, export: Callable[[], None], output: Path) -> int:
    """Train, and export the model. Returns the process' exit code."""
    trainer.distribute()
    announce(trainer)
    if trainer.world.rank == 0:
        write_json(output / "config.json", trainer.config)
    stopped_by = trainer.fit(StopSignal())
    if stopped_by:
        trainer.say(f"{signal.Signals(stopped_by).name}: stopped after step {trainer.step}, checkpoint saved")
    elif trainer.world.rank == 0 and model.exported_step(output / "model") != trainer.step:
        export()
        trainer.say(f"model for the next stage in {output / 'model'}")
    trainer.close()
    return 128 + stopped_by if stopped_by else 0


def prepare(
    cfg: Config, recipe: Path, output: Path, world: World, resume_from: Path | None, load: Load[Config], chat: bool
) -> tuple[Trainer, Callable[[], None]]:
    """What each rank does on its own: tokenizer, data, model, checkpoint. Returns also what exports the model."""
    opened = open_model(cfg.model, world, chat)
    data = load(cfg, recipe, opened.tokenizer)
    network = opened.load(cfg.seed, weights=resume_from is None)
    # What has to stay the same for a run to go on from a checkpoint: where it started, the data, the architecture.
    fingerprint = {
        "data.seq_length": str(cfg.data.seq_length),
        "data.train": f"sha256 {data.digest[:16]}",
        "model.path": str(cfg.model.path),
        **model.architecture(opened.config),
    }
    trainer = Trainer(network, data.train, data.val, cfg.train, cfg.seed, output, fingerprint, world)
    trainer.config = checkpoint.flat(dataclasses.asdict(cfg))
    trainer.resume(resume_from)

    return trainer, opened.exporter(trainer, output / "model", data.name)


@dataclass(frozen=True)
class OpenModel:
    """A model that is about to be trained: all but its weights."""

    cfg: ModelConfig
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype  # that its export will have

    def load(self, seed: int, weights: bool) -> PreTrainedModel:
        torch.manual_seed(seed)
        return model.load_model(self.cfg, self.config, weights)

    def exporter(self, trainer: Run, folder: Path, data: str) -> Callable[[], None]:
        def export() -> None:
            record = {"step": trainer.step, "tokenizer": self.cfg.tokenizer or self.cfg.path, "data": data}
            model.export_model(trainer.model, self.tokenizer, folder, self.dtype, record)

        return export


def open_model(cfg: ModelConfig, world: World, chat: bool) -> OpenModel:
    name = cfg.tokenizer or cfg.path
    if not name:
        raise RecipeError("the config names no tokenizer.\nSet model.tokenizer=bytes or to a local folder.")
    tokenizer = load_tokenizer(name, chat)
    if chat:
        manifest.say(which_template(tokenizer))
    config = model.model_config(cfg, tokenizer)
    model.check_memory(config, world.device)
    return OpenModel(cfg, config, tokenizer, model.stored_dtype(config))  # the type, before loading overwrites it


def verify(path: Path) -> None:
    """Compare prepared data with the SHA-256 in its manifest, once on each node."""
    if local_rank() == 0:
        manifest.check(path)


def quiet_libraries(world: World) -> None:
    """On the CPU, transformers recommends CUDA kernels; with many ranks, each warning comes many times."""
    transformers.logging.disable_progress_bar()
    if world.device.type == "cpu" or world.rank > 0:
        transformers.logging.set_verbosity_error()


def announce(trainer: Run) -> None:
    """Say where the run stands. Raises RecipeError where another config would have nothing left to do."""
    world, steps = trainer.world, trainer.cfg.steps
    trainer.say(
        f"{trainer.model.num_parameters():,} parameters, {world.size} ranks on {world.device.type}, "
        f"{trainer.describe()}"
    )
    for change in trainer.changed:
        trainer.say(f"changed since the checkpoint: {change}")
    if trainer.step >= steps and trainer.changed:
        raise RecipeError(
            f"step {trainer.step} of {steps} was reached with another config: {'; '.join(trainer.changed)}.\n"
            "Start another experiment with --name NAME, or undo the change."
        )
    if trainer.step < steps:
        trainer.say(f"resumed at step {trainer.step} of {steps}" if trainer.step else f"starting, {steps} steps")
    else:
        figures = "".join(f", {name} {value:.4f}" for name, value in trainer.evaluate().items())
        trainer.say(f"resumed at step {trainer.step} of {steps}: nothing left to train{figures}")
