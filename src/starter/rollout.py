"""Rollouts: prompts of data/prep/rl, and the answers that a policy writes to them, with their rewards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from starter import chat, grpo
from starter.config import RecipeError
from starter.dialogue import ROLES, Dialogue
from starter.grpo import Answers
from starter.reward import is_right, reward


@dataclass(frozen=True)
class Prompt:
    ids: list[int]  # ChatML, up to where the assistant begins to write
    expected: str


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    answers: Answers
    rewards: torch.Tensor  # [G]
    right: torch.Tensor  # [G], bool


# ---------------------------------------------------------------- prompts


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The rows of a split, in their order. A bad row is an error: none is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecipeError(f"cannot read the prompts {path}: {error.strerror}.\nRun data/prep/rl before.") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompts.append(parse_prompt(line, tokenizer))
            except (ValueError, LookupError, TypeError) as error:
                raise RecipeError(
                    f"{path}:{number}: not a prompt ({type(error).__name__}: {error}).\n"
                    "Mend that row where data/prep/rl took it from, and run data/prep/rl again."
                ) from error
    return prompts


def parse_prompt(line: bytes, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Raises ValueError, LookupError or TypeError that says what is wrong."""
    row = json.loads(line)
    params, expected = row["responses_create_params"], row["expected_answer"]
    messages = params["input"]
    if isinstance(expected, bool) or not isinstance(expected, (str, int, float)):
        raise ValueError("expected_answer is no text")
    if not isinstance(messages, list) or not messages:
        raise ValueError("responses_create_params.input lists no messages")
    for message in messages:
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise ValueError(f"a message must have content and one of the roles {', '.join(ROLES)}")
    return Prompt(chat.prompt_ids(Dialogue(messages, params.get("tools") or None), tokenizer), str(expected))


# ---------------------------------------------------------------- answers


class Rollout:
    """A policy that answers. It lives in a Ray actor and takes the learner's weights before it writes."""

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int, batch_size: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(self.device).eval()
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.end = chat.end_id(tokenizer)

    def answer(
        self, weights: dict[str, torch.Tensor], prompts: list[Prompt], samples: list[int], size: int, room: int,
        greedy: bool,
    ) -> list[Group]:  # fmt: skip
        """``size`` answers to each prompt, of at most ``room`` tokens. ``samples`` are the prompts' places in the run,
        which with the seed decide what is drawn, whatever actor draws it and in whatever batch."""
        self.model.load_state_dict(weights)
        groups: dict[int, Group] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # so that little is padding
        count = max(1, self.batch_size // size)
        for first in range(0, len(order), count):
            batch = order[first : first + count]
            ids = [prompts[i].ids for i in batch for _ in range(size)]
            uniform = grpo.uniforms(self.seed, [samples[i] for i in batch], size, room)
            answers = grpo.sample(self.model, ids, uniform, self.end, greedy)
            for n, i in enumerate(batch):
                rows = slice(n * size, (n + 1) * size)
                mine = Answers(answers.tokens[rows], answers.lengths[rows], answers.logprobs[rows])
                groups[i] = self.graded(mine, prompts[i].expected)
        return [groups[i] for i in range(len(prompts))]

    def graded(self, answers: Answers, expected: str) -> Group:
        rewards, right = [], []
        for tokens, length in zip(answers.tokens.tolist(), answers.lengths.tolist(), strict=True):
            ended = tokens[length - 1] == self.end
            text = str(self.tokenizer.decode(tokens[: length - 1] if ended else tokens[:length]))
            rewards.append(reward(text, ended, expected))
            right.append(ended and is_right(text, expected))
        return Group(answers, torch.tensor(rewards), torch.tensor(right))
