"""The training loop: packed sequences in, checkpoints and metrics out, the same on one process and on many.

The gradient of a step is that of the mean loss over all target tokens of its global batch, however many ranks share
the batch and however the targets fall on them.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from starter.chat import IGNORE
from starter.config import RecipeError, TrainConfig
from starter.distributed import World, leave
from starter.run import Run, batch_indices


class Sequences(Protocol):
    """Training data: sequences of one length. A label is its token's id, or IGNORE where it is no target."""

    @property
    def seq_length(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels of these sequences, int64, [len(indices), seq_length]."""

    def tokens(self, indices: list[int]) -> int:
        """How many tokens of these sequences are no padding."""


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


class Trainer(Run):
    """A run on sequences of tokens, with or without DDP."""

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
        super().__init__(model, cfg, seed, output, fingerprint, world)
        self.data, self.val = data, val
        self.ddp: torch.nn.Module = self.model

    def describe(self) -> str:
        return f"{len(self.data)} sequences of {self.data.seq_length} tokens"

    def distribute(self) -> None:
        """Put DDP around the model."""
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

    def train_step(self) -> tuple[torch.Tensor, dict[str, float]]:
        """One optimizer step. Returns this rank's share of the mean loss, and the norm of the gradient."""
        cfg, world = self.cfg, self.world
        indices = batch_indices(len(self.data), self.seed, self.samples, cfg.global_batch_size)
        targets = max(1, count_targets(self.data.batch(indices)[1]))
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
        norm = self.apply_gradient()
        self.step += 1
        self.samples += cfg.global_batch_size
        self.tokens += self.data.tokens(indices)
        return total, {"grad_norm": norm}

    def _gradient_sync(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Only the last micro-batch of a step exchanges gradients."""
        if wanted or not isinstance(self.ddp, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def _to_device(self, data: Sequences, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = data.batch(indices)
        return ids.to(self.world.device), labels.to(self.world.device)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the targets of the validation data, in nats per token."""
        val = self.val
        if val is None:
            return {}
        self.model.eval()
        mine = shard(list(range(len(val))), self.world)
        total, targets = torch.zeros((), device=self.world.device), 0
        for start in range(0, len(mine), self.cfg.micro_batch_size):
            ids, labels = self._to_device(val, mine[start : start + self.cfg.micro_batch_size])
            total += loss_sum(self.model, ids, labels)
            targets += count_targets(labels)
        loss, count = self.world.total(total.item(), targets)
        return {"val_loss": loss / max(1, count)}
