"""A recipe's configuration: `--config PATH [key=value …]`, YAML into dataclasses, strict about keys and types."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

ENV_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,([^${}]*))?\}")  # one that holds no other: the innermost


class RecipeError(Exception):
    """What is wrong, and on a second line what to do about it."""


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None  # fine-tune the checkpoint in this local folder, Hugging Face format …
    config: dict[str, Any] = field(default_factory=dict)  # … or build a new NemotronH from these numbers
    tokenizer: str | None = None  # "bytes" or a local folder; by default the one in model.path


@dataclass(frozen=True)
class DataConfig:
    train: str
    seq_length: int
    val: str | None = None
    verify: bool = False  # compare prepared data with the SHA-256 in its manifest


@dataclass(frozen=True)
class TokenDataConfig:
    blend: str  # blend.json of data/prep/pretrain
    seq_length: int
    verify: bool = False


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    global_batch_size: int  # sequences in an optimizer step, over all ranks
    lr: float
    micro_batch_size: int = 1  # sequences in a forward pass, on each rank
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("warmup_steps", "weight_decay", "gradient_checkpointing"):
                least_is_fine = value >= 0
            else:
                least_is_fine = value > 0
            if not least_is_fine:
                raise RecipeError(f"train.{name} is {value}, which is too small.\nGive a positive number.")


@dataclass(frozen=True)
class PromptDataConfig:
    train: str  # JSONL of data/prep/rl
    val: str | None = None
    verify: bool = False


@dataclass(frozen=True)
class RolloutConfig:
    answers_per_prompt: int  # of which each is compared with the mean
    max_new_tokens: int
    actors: int | None = None  # processes that write answers, spread over the Ray cluster; by default one on each node
    batch_size: int = 64  # answers that an actor writes at once

    def __post_init__(self) -> None:
        least = {"actors": 1, "answers_per_prompt": 2, "max_new_tokens": 1, "batch_size": 1}
        for name, value in least.items():
            if getattr(self, name) is not None and getattr(self, name) < value:
                raise RecipeError(f"rollout.{name} is {getattr(self, name)}.\nGive {value} or more.")


@dataclass(frozen=True)
class GRPOConfig:
    kl: float = 0.05  # weight of the KL term to the policy that the run began with
    clip: float = 0.2
    updates: int = 1  # optimizer steps on the answers of one step
    cold_start: int = 0  # supervised steps on the expected answers before, for a model that is new
    cold_start_lr: float = 0.003

    def __post_init__(self) -> None:
        if self.kl < 0 or not 0 < self.clip < 1 or self.updates < 1 or self.cold_start < 0 or self.cold_start_lr <= 0:
            raise RecipeError(
                f"grpo has a number that makes no sense: {self}.\n"
                "Give kl >= 0, 0 < clip < 1, updates >= 1, cold_start >= 0 and cold_start_lr > 0."
            )


@dataclass(frozen=True)
class SFTConfig:
    output: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    seed: int = 1234


@dataclass(frozen=True)
class PretrainConfig:
    output: str
    model: ModelConfig
    data: TokenDataConfig
    train: TrainConfig
    seed: int = 1234


@dataclass(frozen=True)
class RLConfig:
    output: str
    model: ModelConfig
    data: PromptDataConfig
    rollout: RolloutConfig
    train: TrainConfig  # global_batch_size counts answers
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    seed: int = 1234

    def __post_init__(self) -> None:
        answers, group = self.train.global_batch_size, self.rollout.answers_per_prompt
        if answers % group:
            raise RecipeError(
                f"train.global_batch_size={answers} answers cannot be {group} to each prompt.\n"
                "Make it a multiple of rollout.answers_per_prompt."
            )


def parse_args(cls: type[T], argv: Sequence[str]) -> T:
    """Read the YAML that `--config` names, put the overrides over it, and build a ``cls`` from the result."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the YAML file to read")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=500")
    args = parser.parse_args(argv)
    values = read_yaml(args.config)
    values.pop("artifacts", None)  # of an env.toml that is shared with NVIDIA's recipes
    values.pop("run", None)  # for the launcher, not for us
    for override in args.overrides:
        apply_override(values, override)
    return build(cls, fill_references(values))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the config {path}: {error.strerror}.\nGive its path with --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}\nMend it there.") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no table of keys.\nSee the recipe's config folder for an example.")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set a dotted key in place; its value is read as YAML, so that `data.val=null` and `train.lr=0.1` work."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"cannot use the argument {override!r}.\nWrite overrides as key=value, as in train.steps=500."
        )
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key}: {parent} is a value, not a table.\nOverride {parent} itself.")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {text!r} is not a YAML value.\nQuote it, as in {key}='\"text\"'.") from error


def fill_references(value: Any, where: str = "") -> Any:
    """Replace ``${oc.env:NAME}``, ``${oc.env:NAME,default}`` and ``${manifest:DIR,key}`` in all strings."""
    from starter import manifest  # which stands on this module

    if isinstance(value, dict):
        return {key: fill_references(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_references(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name, default = match.groups()
        quoted = re.fullmatch(r"\s*(['\"])(.*)\1\s*", default or "", re.DOTALL)
        found = os.environ.get(name, quoted.group(2) if quoted else default and default.strip())
        if found is None:
            raise RecipeError(
                f"{where} needs the environment variable {name}, which is not set.\n"
                f"Set it in the profile's env_vars, or give {where}=VALUE."
            )
        return found

    for _ in range(value.count("${oc.env:")):  # the innermost first
        value = ENV_REFERENCE.sub(lookup, value)
    filled = manifest.fill(value, where)
    if isinstance(filled, str) and "${" in filled:
        raise RecipeError(
            f"{where}: cannot resolve {filled!r}.\nThis recipe knows ${{oc.env:NAME}} and ${{manifest:DIR,key}} only."
        )
    return filled


def build(cls: type[T], values: Any, where: str = "") -> T:
    """Make the dataclass ``cls`` from a table; an unknown or missing key and a wrong type are errors."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must be a table of keys, not {values!r}.\nSee the recipe's config folder.")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", [prefix + name for name in hints])
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise RecipeError(f"the config lacks {prefix}{item.name}.\nGive it as {prefix}{item.name}=VALUE.")
    return cls(**{key: convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = [option for option in typing.get_args(hint) if option is not types.NoneType]
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # also "1e-4", which YAML 1.1 reads as a string
        except (TypeError, ValueError):
            pass
    hint = typing.get_origin(hint) or hint
    if type(value) is not hint:
        raise RecipeError(f"{where} must be {hint.__name__}, not {value!r}.\nGive it as {where}=VALUE.")
    return value


def unknown_key(key: str, known: Sequence[str]) -> RecipeError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return RecipeError(f"the config has an unknown key {key}.\nThe nearest known key is {near[0]}.")
