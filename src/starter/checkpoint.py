"""What a run writes: checkpoints that exist only whole, and metrics that never run ahead of them after a resume.

    <output>/checkpoints/step-00000050.pt    model, optimizer, and how far the run was
    <output>/metrics.jsonl                   one JSON object for each logged step
    <output>/config.json                     the config of the run that wrote here last

Rank 0 writes, every rank reads. The learning rate, the order of the data and the random numbers of a step are
functions of the step and the seed, so that a checkpoint need not hold them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from starter.config import RecipeError
from starter.files import write_atomically

NAME = re.compile(r"step-(\d{8})\.pt")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    return max(list_checkpoints(folder), default=None)


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> Path:
    path = folder / f"step-{state['step']:08d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RecipeError(
            f"rank 0 sees the checkpoint {path}, this node does not.\nPut output on storage that all nodes share."
        ) from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(f"the checkpoint {path} is damaged.\nRemove it to go on from the one before.") from error


def check_fingerprint(path: Path, saved: dict[str, str], current: dict[str, str]) -> None:
    """Refuse a checkpoint of other data or another model. Keys that only one side knows come from another version."""
    for key, value in saved.items():
        if key in current and current[key] != value:
            raise RecipeError(
                f"{path} was trained with {key} = {value}, now it is {current[key]}.\n"
                "Undo that change, or start anew with another output=FOLDER."
            )


# They change how a run is carried out, not what comes out of it; data and model stand in the fingerprint.
MANNER = ("output", "data.train", "data.val", "data.blend", "data.verify", "model.path", "model.tokenizer",
          "rollout.actors", "rollout.batch_size", *(f"train.{name}" for name in (
    "micro_batch_size", "gradient_checkpointing", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"
)))  # fmt: skip


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"train": {"lr": 0.1}} -> {"train.lr": 0.1}, without what MANNER names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = above + name
        if isinstance(value, Mapping) and value:
            found |= flat(value, key + ".")
        elif key not in MANNER:
            found[key] = value
    return found


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What has changed between two configs, as "train.lr was 0.003 and is 0.5"; nothing if one is not known."""
    keys = sorted(set(saved) | set(current)) if saved and current else []
    return [
        f"{key} was {saved.get(key)} and is {current.get(key)}" for key in keys if saved.get(key) != current.get(key)
    ]


def truncate_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, and a line that it did not finish.

    Written anew in any case, so that a folder which cannot be written to shows before the training, not after it.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    write_atomically(path, lambda file: file.writelines(kept))


def append_metrics(path: Path, metrics: dict[str, float]) -> None:
    """Append one line and bring it to the disk: it must be there before a checkpoint of its step is."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())
