"""The training loop: packed sequences in, checkpoints and metrics out, the same on one process and on many.

The gradient of a step is that of the mean loss over all target tokens of its global batch, however many ranks share
the batch and however the targets fall on them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from starter import checkpoint
from starter.chat import IGNORE
from starter.config import RecipeError, TrainConfig
from starter.distributed import StopSignal, World, leave

MIN_LR_RATIO = 0.1  # the learning rate ends at this share of its peak


class Sequences(Protocol):
    """Training data: sequences of one length. A label is its token's id, or IGNORE where it is no target."""

    @property
    def seq_length(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels of these sequences, int64, [len(indices), seq_length]."""

    def tokens(self, indices: list[int]) -> int:
        """How many tokens of these sequences are no padding."""


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


def shard(indices: list[int], world: World) -> list[int]:
    """This rank's part. All parts together are ``indices``, each exactly once."""
    return indices[world.rank :: world.size]


def loss_sum(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the targets, for input_ids and labels of shape [B, L]."""
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.is_cuda):
        logits = model(input_ids=input_ids, use_cache=False).logits
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")


def count_targets(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORE).sum())


def make_optimizer(model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only, not for norms, biases and the per-head numbers of Mamba."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


class Trainer:
    """A run in an output folder: where it stands (step, samples, tokens), and what moves it on."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Sequences,
        val: Sequences | None,
        cfg: TrainConfig,
        seed: int,
        output: Path,
        fingerprint: dict[str, str],
        world: World,
    ) -> None:
        if cfg.global_batch_size < world.size:
            raise RecipeError(
                f"train.global_batch_size is {cfg.global_batch_size}, fewer than the {world.size} ranks.\n"
                f"Set train.global_batch_size={world.size} or more."
            )
        self.data, self.val, self.cfg, self.seed, self.world = data, val, cfg, seed, world
        self.fingerprint = fingerprint
        self.checkpoints, self.metrics = output / "checkpoints", output / "metrics.jsonl"
        self.step = self.samples = self.tokens = 0
        self.model = model
        self.model.to(world.device)  # type: ignore[arg-type]
        if cfg.gradient_checkpointing:
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # then and now
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
        self.optimizer = make_optimizer(model, cfg)
        self.ddp: torch.nn.Module = self.model

    def resume(self, path: Path | None) -> None:
        """Take the state from a checkpoint, if there is one, and drop the metrics that were logged after it."""
        if path:
            state = checkpoint.load_checkpoint(path)
            checkpoint.check_fingerprint(path, state["fingerprint"], self.fingerprint)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group, weight_decay in zip(self.optimizer.param_groups, (self.cfg.weight_decay, 0.0), strict=True):
                group["weight_decay"] = weight_decay  # of this run, not of the one that saved
            self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]
        if self.world.rank == 0:
            checkpoint.truncate_metrics(self.metrics, self.step)

    def distribute(self) -> None:
        """Put DDP around the model. All ranks call this at once, and ``close`` at the end."""
        if self.world.size > 1:
            # No find_unused_parameters: transformers keeps all experts of a layer in one tensor, so that every
            # parameter has a gradient in every step, also when no token chose some expert.
            self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def close(self) -> None:
        """Leave the process group, DDP first.

        In the other order DDP would drop the last reference to the group while it holds the interpreter lock, and wait
        for a thread of gloo that waits for that lock: torch 2.13 hangs so in one exit of a few.
        """
        self.ddp = self.model
        gc.collect()
        leave(self.world)

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
            loss, grad_norm = self.train_step()
            last = self.step == self.cfg.steps
            evaluate = self.val is not None and (last or self.step % self.cfg.eval_every == 0)
            if evaluate or last or self.step % self.cfg.log_every == 0:
                self._log(loss, grad_norm, evaluate, clock)
            if last or self.step % self.cfg.checkpoint_every == 0:
                self.save()
                clock.restart(self.tokens)
        return 0

    def train_step(self) -> tuple[torch.Tensor, float]:
        """One optimizer step. Returns this rank's share of the mean loss, and the norm of the gradient."""
        cfg, world = self.cfg, self.world
        indices = batch_indices(len(self.data), self.seed, self.samples, cfg.global_batch_size)
        targets = max(1, count_targets(self.data.batch(indices)[1]))
        lr = learning_rate(self.step, cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Dropout, where a model has it, then repeats after a resume and differs between ranks.
        torch.manual_seed((self.seed * 1_000_003 + self.step) * 65_537 + world.rank)

        self.ddp.train()
        mine = shard(indices, world)
        starts = range(0, len(mine), cfg.micro_batch_size)
        total = torch.zeros((), device=world.device)
        for start in starts:
            ids, labels = self._to_device(self.data, mine[start : start + cfg.micro_batch_size])
            with self._gradient_sync(start == starts[-1]):
                loss = loss_sum(self.ddp, ids, labels) / targets
                (loss * world.size).backward()  # DDP divides by the number of ranks
            total += loss.detach()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.clip_grad_norm))
        if not math.isfinite(norm):  # the same on every rank, so that all stop here
            raise RecipeError(
                f"the gradient is not finite at step {self.step + 1}.\nLower train.lr: the last checkpoint is sound."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.samples += cfg.global_batch_size
        self.tokens += self.data.tokens(indices)
        return total, norm

    def _gradient_sync(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Only the last micro-batch of a step exchanges gradients."""
        if wanted or not isinstance(self.ddp, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _to_device(self, data: Sequences, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = data.batch(indices)
        return ids.to(self.world.device), labels.to(self.world.device)

    @torch.no_grad()
    def evaluate(self, val: Sequences) -> float:
        """Mean loss over the targets of ``val``, in nats per token."""
        self.model.eval()
        mine = shard(list(range(len(val))), self.world)
        total, targets = torch.zeros((), device=self.world.device), 0
        for start in range(0, len(mine), self.cfg.micro_batch_size):
            ids, labels = self._to_device(val, mine[start : start + self.cfg.micro_batch_size])
            total += loss_sum(self.model, ids, labels)
            targets += count_targets(labels)
        loss, count = self.world.total(total.item(), targets)
        return loss / max(1, count)

    def _log(self, loss: torch.Tensor, grad_norm: float, evaluate: bool, clock: Clock) -> None:
        mean_loss = self.world.total(loss.item())[0]
        tokens_per_s, eta = clock.measure(self.tokens, self.step, self.cfg.steps)
        metrics: dict[str, float] = {"step": self.step, "loss": mean_loss}
        text = f"step {self.step}/{self.cfg.steps}  loss {mean_loss:.4f}"
        if evaluate and self.val is not None:
            metrics["val_loss"] = self.evaluate(self.val)
            text += f"  val_loss {metrics['val_loss']:.4f}"
        metrics |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "tokens": self.tokens,
            "tokens_per_s": round(tokens_per_s, 1),
            "world_size": self.world.size,
        }
        if self.world.rank == 0:
            checkpoint.append_metrics(self.metrics, metrics)
        self.say(f"{text}  {tokens_per_s:,.0f} tokens/s  {eta} left")
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
