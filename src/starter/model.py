"""The model: a new NemotronH from numbers, or a checkpoint from a local folder; and its export for the next stage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from starter.chat import end_id, id_count, pad_id
from starter.config import ModelConfig, RecipeError, unknown_key
from starter.files import sync_folder
from starter.template import first_line

try:
    from transformers import NemotronHConfig
except ImportError as error:
    raise SystemExit(
        f"error: transformers {transformers.__version__} has no NemotronH.\n"
        "Install transformers 5.3 or newer: pip_extras in the profile, or another image."
    ) from error

BYTES_PER_PARAMETER = 18  # float32 weight, gradient and two AdamW moments, and autocast's bfloat16 copy of the weight

# Fields of a model's config that say nothing about its architecture.
VOLATILE = {"transformers_version", "_name_or_path", "dtype", "architectures", "auto_map", "use_cache"}


def model_config(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if cfg.path and cfg.config:
        raise RecipeError("the config has both model.path and model.config.\nUse -c finetune with model.path.")
    if cfg.path:
        try:
            config = AutoConfig.from_pretrained(checkpoint_folder(cfg.path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise RecipeError(f"no model in {cfg.path}: {first_line(error)}\nSet model.path=FOLDER.") from error
    else:
        config = new_config(cfg.config, tokenizer)
    ids = id_count(tokenizer)
    if ids > config.vocab_size:
        raise RecipeError(
            f"the tokenizer has ids for {ids} tokens, the model's vocab_size is {config.vocab_size}.\n"
            "Give model.tokenizer, the one that belongs to the model, or raise model.config.vocab_size."
        )
    return config


def checkpoint_folder(path: str) -> str:
    """The path, once it is known to be a folder: what is not one, transformers would take for a name on the hub."""
    if not Path(path).is_dir():
        raise RecipeError(f"the model folder {path} does not exist.\nSet model.path to a folder in the pod.")
    return path


def new_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> NemotronHConfig:
    known = [name for name in NemotronHConfig().to_dict() if name not in VOLATILE]
    for name in fields:
        if name not in known:
            raise unknown_key(f"model.config.{name}", [f"model.config.{key}" for key in known])
    ids = {"pad_token_id": pad_id(tokenizer), "eos_token_id": end_id(tokenizer)}
    try:
        return NemotronHConfig(**{"bos_token_id": None, **ids, **fields})
    except Exception as error:  # the library's validators raise classes of their own
        raise RecipeError(f"model.config is not valid: {first_line(error)}\nMend that field.") from error


def load_model(cfg: ModelConfig, config: PreTrainedConfig, weights: bool) -> PreTrainedModel:
    """The model in float32, on the CPU. Without ``weights`` they stay random, for a checkpoint to fill in."""
    if not cfg.path or not weights:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            cfg.path,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"cannot load {cfg.path}: {first_line(error)}\nSet model.path to a complete folder."
        ) from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        raise RecipeError(
            f"{cfg.path} lacks {len(report['missing_keys'])} weights, such as {min(report['missing_keys'])}.\n"
            "Set model.path to a complete folder."
        )
    return model


def check_memory(config: PreTrainedConfig, device: torch.device) -> None:
    """Say before a long load, rather than after it, that a model does not fit."""
    if device.type != "cuda":
        return
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    needed, there = parameters * BYTES_PER_PARAMETER, torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise RecipeError(
            f"training {parameters / 1e9:.1f} billion parameters takes {needed / 2**30:.0f} GiB on each GPU, "
            f"which has {there / 2**30:.0f} GiB.\nUse a smaller model: this recipe does not shard one over GPUs."
        )


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The type that the weights had on disk, and will have again in an export; float32 for a new model."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def architecture(config: PreTrainedConfig) -> dict[str, str]:
    """What two models must have in common for one to take the other's checkpoint."""
    fields = config.to_dict().items()
    return {f"model.{name}": json.dumps(value, sort_keys=True) for name, value in fields if name not in VOLATILE}


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, record: dict[str, Any]
) -> None:
    """Write weights, config, tokenizer and ``training.json`` to a folder that a later stage can take as model.path."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    parameters = dict(model.named_parameters())
    # Buffers keep their precision: the experts' correction bias is float32 in every checkpoint.
    state = {name: value.to(dtype) if name in parameters else value for name, value in model.state_dict().items()}
    try:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        model.save_pretrained(new, state_dict=state)
        model.config.dtype = dtype
        model.config.save_pretrained(new)  # again: the model wrote its own type there, float32
        tokenizer.save_pretrained(new)
        (new / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RecipeError(f"cannot write {folder}: {error.strerror}\nFree space there and start again.") from error


def exported_step(folder: Path) -> int | None:
    """The step of the export in ``folder``, if there is one."""
    try:
        return json.loads((folder / "training.json").read_text(encoding="utf-8"))["step"]
    except FileNotFoundError:
        return None
