"""A training run, whatever it learns from: where it stands, what moves it on, its checkpoints and metrics."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from starter import checkpoint
from starter.config import RecipeError, TrainConfig
from starter.distributed import StopSignal, World

MIN_LR_RATIO = 0.1  # the learning rate ends at this share of its peak
QUIET = ("grad_norm",)  # in the metrics, but not on the screen


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warmup, then a cosine down to MIN_LR_RATIO at the last step. ``step`` counts from 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress)))


@functools.lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


def batch_indices(size: int, seed: int, first: int, count: int) -> list[int]:
    """The sequences that samples ``first`` to ``first + count`` of an endless run over the data refer to.

    Each epoch holds every one of the ``size`` sequences once, in an order of its own.
    """
    return [epoch_order(size, seed, n // size)[n % size] for n in range(first, first + count)]


def make_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, not for norms, biases and the per-head numbers of Mamba."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


class Run:
    """A run in an output folder: where it stands (step, samples, tokens). What a step is, a subclass tells."""

    def __init__(
        self,
        model: PreTrainedModel,
        cfg: TrainConfig,
        seed: int,
        output: Path,
        fingerprint: dict[str, str],
        world: World,
    ) -> None:
        self.cfg, self.seed, self.world, self.fingerprint = cfg, seed, world, fingerprint
        self.checkpoints, self.metrics = output / "checkpoints", output / "metrics.jsonl"
        self.config: dict[str, Any] = {}  # flat, without what does not matter
        self.changed: list[str] = []  # in the config since the checkpoint
        self.step = self.samples = self.tokens = 0
        self.model = model
        self.model.to(world.device)  # type: ignore[arg-type]
        if cfg.gradient_checkpointing:
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # then and now
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
        self.optimizer = make_optimizer(model, cfg)

    def train_step(self) -> tuple[torch.Tensor, dict[str, float]]:
        """One step. Returns this rank's share of the loss, and figures that are the same on every rank."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Figures of the validation data; none where there is no such data."""
        raise NotImplementedError

    def describe(self) -> str:
        """The run, in a few words."""
        raise NotImplementedError

    def distribute(self) -> None:
        """Get ready to train together. All ranks call this at once, and ``close`` at the end."""

    def close(self) -> None:
        """Take leave of the others."""

    def resume(self, path: Path | None) -> None:
        """Take the state from a checkpoint, if there is one, and drop the metrics that were logged after it."""
        if path:
            state = checkpoint.load_checkpoint(path)
            checkpoint.check_fingerprint(path, state["fingerprint"], self.fingerprint)
            self.changed = checkpoint.differences(state.get("config", {}), self.config)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group, weight_decay in zip(self.optimizer.param_groups, (self.cfg.weight_decay, 0.0), strict=True):
                group["weight_decay"] = weight_decay  # of this run, not of the one that saved
            self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]
        if self.world.rank == 0:
            checkpoint.truncate_metrics(self.metrics, self.step)

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.world.rank == 0:
            print(text, flush=True)

    def save(self) -> None:
        if self.world.rank == 0:
            state: dict[str, Any] = {
                "step": self.step,
                "samples": self.samples,
                "tokens": self.tokens,
                "fingerprint": self.fingerprint,
                "config": self.config,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            checkpoint.save_checkpoint(self.checkpoints, state, self.cfg.keep_checkpoints)

    def fit(self, stop: StopSignal) -> int:
        """Train to cfg.steps. Returns 0, or the number of the signal that ended the run after a checkpoint."""
        clock = Clock(self.step, self.tokens)
        while self.step < self.cfg.steps:
            if number := stop.agreed(self.world):
                self.save()
                return number
            self.set_learning_rate()
            loss, figures = self.train_step()
            last = self.step == self.cfg.steps
            evaluate = last or self.step % self.cfg.eval_every == 0
            if evaluate or last or self.step % self.cfg.log_every == 0:
                self._log(loss, figures, evaluate, clock)
            if last or self.step % self.cfg.checkpoint_every == 0:
                self.save()
                clock.restart(self.tokens)
        return 0

    def set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.cfg)

    def apply_gradient(self) -> float:
        """Clip the gradient and step the optimizer. Returns the gradient's norm before that."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad_norm))
        if not math.isfinite(norm):  # the same on every rank, so that all stop here
            raise RecipeError(
                f"the gradient is not finite at step {self.step + 1}.\nLower train.lr: the last checkpoint is sound."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _log(self, loss: torch.Tensor, figures: dict[str, float], evaluate: bool, clock: Clock) -> None:
        mean_loss = self.world.total(loss.item())[0]
        tokens_per_s, eta = clock.measure(self.tokens, self.step, self.cfg.steps)
        told = {"loss": mean_loss, **figures, **(self.evaluate() if evaluate else {})}
        metrics = {
            "step": self.step,
            **told,
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens": self.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "world_size": self.world.size,
        }
        if self.world.rank == 0:
            checkpoint.append_metrics(self.metrics, metrics)
        text = "  ".join(f"{name} {value:.4f}" for name, value in told.items() if name not in QUIET)
        self.say(f"step {self.step}/{self.cfg.steps}  {text}  {tokens_per_s:,.0f} tokens/s  {eta} left")
        clock.restart(self.tokens)


class Clock:
    """Tokens per second since the last log line, and the time left; evaluation and checkpoints are not counted."""

    def __init__(self, step: int, tokens: int) -> None:
        self.first_step, self.spent = step, 0.0
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        self.tokens, self.since = tokens, time.monotonic()

    def measure(self, tokens: int, step: int, steps: int) -> tuple[float, str]:
        elapsed = time.monotonic() - self.since
        self.spent += elapsed
        left = int((steps - step) * self.spent / max(1, step - self.first_step))
        return (tokens - self.tokens) / max(elapsed, 1e-9), f"{left // 60}:{left % 60:02d}"
