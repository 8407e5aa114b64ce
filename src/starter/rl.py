"""Reinforcement learning by GRPO on Ray: prompts of data/prep/rl → a model folder for the next stage.

This process holds the learner. In each step the actors of a crew, spread over the cluster's nodes, take its weights,
write a group of answers to each of some prompts and grade them; the learner turns the grades into one gradient. What
the actors draw is a function of the seed and of a prompt's place in the run, not of how many actors there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from starter import checkpoint, cluster, grpo, training
from starter.chat import IGNORE, end_id, text_ids
from starter.config import RecipeError, RLConfig, parse_args
from starter.distributed import World, alone
from starter.files import write_atomically
from starter.model import architecture
from starter.rollout import Group, Prompt, Rollout, read_prompts
from starter.run import Run, batch_indices, make_optimizer
from starter.training import OpenModel

COLD_START_BATCH = 32


class Crew(Protocol):
    """What writes the answers (cluster.Crew)."""

    nodes: int
    count: int

    def share(self, value: Any) -> Any: ...

    def call(self, method: str, *arguments: list[Any]) -> list[Any]: ...


def main(recipe: Path) -> NoReturn:
    training.guarded(lambda: run(recipe, sys.argv[1:]))


def run(recipe: Path, argv: list[str]) -> int:
    cfg = parse_args(RLConfig, argv)
    world, output = alone(), training.output_folder(cfg.output)
    training.quiet_libraries(world)
    opened = training.open_model(cfg.model, world, chat=True)
    with training.held(output, world):
        learner = prepare(cfg, recipe, opened, output, world)
        with assembled(cfg, opened, learner) as crew:
            learner.crew = crew
            return training.conclude(learner, opened.exporter(learner, output / "model", cfg.data.train), output)


@contextlib.contextmanager
def assembled(cfg: RLConfig, opened: OpenModel, learner: Learner) -> Iterator[Crew]:
    """The actors, on a Ray cluster."""
    size = sum(value.numel() * value.element_size() for value in learner.model.state_dict().values())
    make = functools.partial(Rollout, opened.config, opened.tokenizer, cfg.seed, cfg.rollout.batch_size)
    with cluster.joined(cfg.rollout.actors or 2, store=4 * size) as ray:
        yield cluster.Crew(ray, make, cfg.rollout.actors)


def prepare(cfg: RLConfig, recipe: Path, opened: OpenModel, output: Path, world: World) -> Learner:
    """The learner, where its checkpoint left it, or at its beginning: then the reference is written beside it."""
    paths = [recipe / path for path in (cfg.data.train, cfg.data.val) if path]
    if cfg.data.verify:
        for path in paths:
            training.verify(path)
    train, *val = (read_prompts(path, opened.tokenizer) for path in paths)
    if not train:
        raise RecipeError(f"{paths[0]} holds no prompt.\nRun data/prep/rl on a blend that has some.")
    resume_from = checkpoint.newest_checkpoint(output / "checkpoints")
    network = opened.load(cfg.seed, weights=resume_from is None)
    fingerprint = {
        "data.train": f"sha256 {digest(train)[:16]}",
        "model.path": str(cfg.model.path),
        **architecture(opened.config),
    }
    learner = Learner(network, train, val[0] if val else [], cfg, output, fingerprint, world, opened)
    learner.config = checkpoint.flat(dataclasses.asdict(cfg))
    learner.resume(resume_from)
    path = output / "checkpoints" / "reference.pt"
    if not resume_from:
        learner.cold_start()
        weights = network.state_dict()
        write_atomically(path, lambda file: torch.save(weights, file))
    learner.reference.load_state_dict(checkpoint.load_checkpoint(path))
    return learner


def digest(prompts: list[Prompt]) -> str:
    return hashlib.sha256(repr(prompts).encode("utf-8", "backslashreplace")).hexdigest()


class Learner(Run):
    """The policy that is trained, and the reference policy that it must not leave too far behind."""

    crew: Crew

    def __init__(
        self, model: PreTrainedModel, train: list[Prompt], val: list[Prompt], cfg: RLConfig, output: Path,
        fingerprint: dict[str, str], world: World, opened: OpenModel,
    ) -> None:  # fmt: skip
        super().__init__(model, cfg.train, cfg.seed, output, fingerprint, world)
        self.train, self.val, self.rollout, self.grpo = train, val, cfg.rollout, cfg.grpo
        self.tokenizer, self.end = opened.tokenizer, end_id(opened.tokenizer)
        self.reference = opened.load(cfg.seed, weights=False).to(world.device).eval()  # type: ignore[arg-type]

    def describe(self) -> str:
        return (
            f"{len(self.train)} prompts and {len(self.val)} for validation, "
            f"{self.crew.count} rollout actors on {self.crew.nodes} node" + "s" * (self.crew.nodes > 1)
        )

    def cold_start(self) -> None:
        """Teach a new model by the expected answers what an answer looks like, so that some earn a reward."""
        if not self.grpo.cold_start:
            return
        self.say(f"cold start: {self.grpo.cold_start} supervised steps, since this model has learned nothing yet")
        optimizer = make_optimizer(self.model, self.cfg)
        self.model.train()
        for step in range(self.grpo.cold_start):
            for group in optimizer.param_groups:
                group["lr"] = self.grpo.cold_start_lr * min(1.0, (step + 1) / 10)
            indices = batch_indices(len(self.train), self.seed, step * COLD_START_BATCH, COLD_START_BATCH)
            ids, labels = self._supervised([self.train[i] for i in indices])
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    def _supervised(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels, [B, L]: the prompts with their expected answers, which alone are targets."""
        answers = [[*text_ids(prompt.expected, self.tokenizer), self.end] for prompt in prompts]
        whole = [prompt.ids + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, lengths = grpo.right_padded(whole, 0, self.end)
        places, begin = torch.arange(ids.shape[1]), lengths - torch.tensor([len(answer) for answer in answers])
        target = (places >= begin[:, None]) & (places < lengths[:, None])
        return ids.to(self.world.device), torch.where(target, ids, IGNORE).to(self.world.device)

    def answers(self, prompts: list[Prompt], first: int, size: int, greedy: bool) -> list[Group]:
        """A group of answers to each prompt, by all actors; ``first`` is the place in the run of the first prompt."""
        weights = self.crew.share({name: value.cpu() for name, value in self.model.state_dict().items()})
        n, places = self.crew.count, list(range(first, first + len(prompts)))
        same = [[value] * n for value in (size, self.rollout.max_new_tokens, greedy)]
        parts = [[part[i::n] for i in range(n)] for part in (prompts, places)]
        found = self.crew.call("answer", [weights] * n, *parts, *same)
        return [found[i % n][i // n] for i in range(len(prompts))]

    def train_step(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Answers to some prompts, then optimizer steps on them. The figures are means over the answers."""
        size = self.rollout.answers_per_prompt
        count = self.cfg.global_batch_size // size
        prompts = [self.train[i] for i in batch_indices(len(self.train), self.seed, self.samples, count)]
        groups = self.answers(prompts, self.samples, size, greedy=False)
        order = sorted(range(count), key=lambda i: len(prompts[i].ids))  # so that little is padding
        groups = [groups[i] for i in order]
        rewards = torch.stack([group.rewards for group in groups])
        ids = [prompts[i].ids for i in order for _ in range(size)]
        batch = Batch(ids, groups, grpo.advantages(rewards).flatten())
        batch.reference = self._reference(batch)
        for _ in range(self.grpo.updates):
            loss, kl = self._gradient(batch)
            norm = self.apply_gradient()
        self.step += 1
        self.samples += count
        self.tokens += int(batch.lengths.sum())
        return loss, {
            "reward": float(rewards.mean()),
            "accuracy": float(torch.stack([group.right for group in groups]).float().mean()),
            "kl": kl,
            "length": float(batch.lengths.float().mean()),
            "grad_norm": norm,
        }

    @torch.no_grad()
    def _reference(self, batch: Batch) -> torch.Tensor:
        """[B, T]: what the reference policy gives each token."""
        size = self.cfg.micro_batch_size
        found = []
        for start in range(0, len(batch), size):
            prompts, tokens, *_ = batch.piece(start, size)
            found.append(grpo.token_logprobs(self.reference, prompts, tokens, self.end).cpu())
        return torch.cat(found)

    def _gradient(self, batch: Batch) -> tuple[torch.Tensor, float]:
        """Add up the gradient of the mean loss. Returns that loss, and the mean KL of a token to the reference."""
        self.model.train()
        total, divergence = torch.zeros((), device=self.world.device), 0.0
        for start in range(0, len(batch), self.cfg.micro_batch_size):
            prompts, tokens, *rest = batch.piece(start, self.cfg.micro_batch_size)
            mask, old, reference, gain = (tensor.to(self.world.device) for tensor in rest)
            logprobs = grpo.token_logprobs(self.model, prompts, tokens, self.end)
            kl = grpo.kl_to_reference(logprobs, reference)
            loss = grpo.policy_loss(logprobs, old, kl, gain, mask, self.grpo.clip, self.grpo.kl) / len(batch)
            loss.backward()
            total += loss.detach()
            divergence += float((kl.detach() * mask).sum())
        return total, divergence / int(batch.lengths.sum())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean reward of the likeliest answer to each validation prompt."""
        if not self.val:
            return {}
        groups = self.answers(self.val, 0, 1, greedy=True)
        rewards, right = (torch.cat([getattr(group, name) for group in groups]) for name in ("rewards", "right"))
        return {"val_reward": float(rewards.mean()), "val_accuracy": float(right.float().mean())}


class Batch:
    """All answers of a step, [B, T] and [B]."""

    def __init__(self, prompts: list[list[int]], groups: list[Group], gain: torch.Tensor) -> None:
        self.prompts, self.gain = prompts, gain
        parts = [group.answers for group in groups]
        self.tokens = torch.cat([part.tokens for part in parts])
        self.lengths = torch.cat([part.lengths for part in parts])
        self.old = torch.cat([part.logprobs for part in parts])
        self.mask = torch.cat([part.mask for part in parts])
        self.reference = torch.zeros_like(self.old)

    def __len__(self) -> int:
        return len(self.prompts)

    def piece(self, start: int, size: int) -> tuple[Any, ...]:
        """Of some answers: prompts, tokens, mask, old and reference log-probabilities, and advantages."""
        rows = slice(start, start + size)
        return tuple(part[rows] for part in (self.prompts, self.tokens, self.mask, self.old, self.reference, self.gain))
