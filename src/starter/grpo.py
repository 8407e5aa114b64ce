"""Group-relative policy optimization: the numbers. Shapes: B answers of at most T tokens, in P groups of G (B = P·G).

Shao et al., "DeepSeekMath" (2024), equations 3 and 4: an answer's advantage is its reward against the mean of its
group, in standard deviations; a clipped ratio to the policy that wrote it; and a KL term to the reference policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

EPSILON = 1e-4  # keeps the advantage finite where a group's rewards hardly differ


@dataclass(frozen=True)
class Answers:
    """What a policy wrote after some prompts."""

    tokens: torch.Tensor  # [B, T], int64; what lies behind an answer's end is of no meaning
    lengths: torch.Tensor  # [B], int64: tokens of an answer, its end included
    logprobs: torch.Tensor  # [B, T]: of each token, when it was drawn

    @property
    def mask(self) -> torch.Tensor:
        """[B, T], bool: whether a token belongs to its answer."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]


def uniforms(seed: int, samples: list[int], group: int, count: int) -> torch.Tensor:
    """[len(samples) * group, count] numbers in [0, 1): a function of the seed and a sample's place in the run alone."""
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
        rows.append(torch.rand(group, count, generator=generator, dtype=torch.float64))
    return torch.cat(rows)


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[B] tokens from logits [B, V] and numbers in [0, 1)."""
    below = logits.double().softmax(-1).cumsum(-1)
    # Scaled by the sum, which rounding may have left a little under 1.
    return torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def right_padded(prompts: list[list[int]], room: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, longest prompt + room] token ids, and [B] the lengths of the prompts."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max()) + room), padding)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return ids, lengths


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: list[list[int]], uniform: torch.Tensor, end: int, greedy: bool
) -> Answers:
    """One answer to each prompt, of at most T tokens for ``uniform`` [B, T]; ``greedy`` takes the likeliest tokens.

    The model is causal, so that padding on the right changes nothing before it. Nothing is cached: each token is a pass
    over what stands before it, which is well for short answers.
    """
    device, (count, room) = model.device, uniform.shape
    ids, starts = (tensor.to(device) for tensor in right_padded(prompts, room, end))
    rows, uniform = torch.arange(count, device=device), uniform.to(device)
    logprobs = torch.zeros(count, room, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    open_ = torch.ones(count, dtype=torch.bool, device=device)
    for place in range(room):
        width = int(starts.max()) + place
        logits = model(input_ids=ids[:, :width], use_cache=False).logits[rows, starts + place - 1].float()
        tokens = logits.argmax(-1) if greedy else draw(logits, uniform[:, place])
        ids[rows, starts + place] = tokens
        logprobs[:, place] = logits.log_softmax(-1)[rows, tokens]
        lengths += open_
        open_ &= tokens != end
        if not open_.any():
            break
    places = starts[:, None] + torch.arange(room, device=device)
    return Answers(ids.gather(1, places).cpu(), lengths.cpu(), logprobs.cpu())


def token_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], tokens: torch.Tensor, padding: int
) -> torch.Tensor:
    """[B, T], on the model's device: what it gives each token of ``tokens`` [B, T], the answers to the prompts."""
    ids, starts = right_padded(prompts, tokens.shape[1], padding)
    places = starts[:, None] + torch.arange(tokens.shape[1])
    ids = ids.scatter(1, places, tokens).to(model.device)
    places, tokens = places.to(model.device), tokens.to(model.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.gather(1, (places - 1)[:, :, None].expand(-1, -1, logits.shape[-1])).float()
    return logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """[P, G] rewards → [P, G]: against the mean of the group, in its standard deviations; 0 where all are the same."""
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, correction=0, keepdim=True) + EPSILON)


def kl_to_reference(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, an unbiased estimate of KL(policy ‖ reference) that is never negative."""
    ratio = reference - logprobs
    return ratio.exp() - ratio - 1


def policy_loss(
    logprobs: torch.Tensor, old: torch.Tensor, kl: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor,
    clip: float, kl_weight: float,
) -> torch.Tensor:  # fmt: skip
    """The loss summed over answers: for each the mean over its tokens. All [B, T], but ``advantage`` [B]."""
    ratio, gain = (logprobs - old).exp(), advantage[:, None]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    return ((kl_weight * kl - surrogate) * mask).sum(1).div(mask.sum(1)).sum()
