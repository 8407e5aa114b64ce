"""The processes of a run: rank, device, the few collectives, and a stop that all ranks agree on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from starter.config import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    def total(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def from_rank_0(self, value: Any) -> Any:
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every rank. An error of one is raised on all, so that none waits for a rank that has left."""
        result: T
        errors: list[RecipeError | None] = [None] * self.size
        try:
            result = work()
        except RecipeError as error:
            errors[self.rank] = error
        if self.size > 1:
            dist.all_gather_object(errors, errors[self.rank])
        for found in errors:
            if found is not None:
                raise found
        return result

    def barrier(self) -> None:
        if self.size > 1:
            self.total(0.0)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def join() -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, a world of one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise RecipeError(
                f"this node starts more processes than its {torch.cuda.device_count()} GPUs.\n"
                "Set nprocs_per_node to the number of GPUs of a node."
            )
        device, backend = torch.device("cuda", local_rank()), "nccl"
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(backend)
    return World(rank, size, device)


def alone() -> World:
    """A world of one, whatever the environment says of ranks."""
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def leave(world: World) -> None:
    """Wait for the slowest rank, which may still be writing, then close the process group."""
    world.barrier()
    if world.size > 1:
        dist.destroy_process_group()


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that a step in progress is finished first."""

    def __init__(self) -> None:
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def agreed(self, world: World) -> int:
        """The signal that some rank received, or 0: the same answer on every rank, whichever the signal reached."""
        if world.size > 1:
            tensor = torch.tensor(self.received, device=world.device)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return int(tensor.item())
        return self.received
