"""A tokenizer's own chat template: what it makes of a dialogue, and which part of that the assistant has to write."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from starter.dialogue import RENDERED, BadRecordError, Dialogue

THOUGHT = ("<think>", "</think>")  # marks that the assistant may write itself
# ChatML, as built in.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """One dialogue: its token ids, and for each whether the loss counts it."""

    ids: list[int]
    mask: list[bool]


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template. None where it has none, or the one that is built in here."""
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return None if template == CHAT_TEMPLATE else template


def which_template(tokenizer: PreTrainedTokenizerBase) -> str:
    return "chat template: " + ("the tokenizer's own" if own_template(tokenizer) else "ChatML, as built in")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def encode_by_template(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    refuse_marks(dialogue, tokenizer)
    text, answers = render_answers(dialogue, tokenizer)
    refuse_losses(dialogue, text)
    found = tokenize_marked(text, tokenizer, return_offsets_mapping=True)
    counted = bytearray(len(text) + 1)  # for each place in the text, whether a token that ends there counts
    for start, end in answers:
        counted[start + 1 : end + 1] = b"\1" * (end - start)
    return Encoded(found["input_ids"], [bool(counted[end]) for _, end in found["offset_mapping"]])


def render_answers(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The dialogue's text, and where in it the assistant writes: from its prompt to the mark that ends its turn.

    For that the template must write what it wrote before, and add to it, with each message that follows.
    """
    text, answers = "", []
    for i, message in enumerate(dialogue):
        if message["role"] == "assistant":
            before, text = text, render(dialogue[: i + 1], tokenizer)
            prompt = next((p for p in prompts(dialogue[:i], tokenizer) if text.startswith(p)), None)
            if prompt is None or not prompt.startswith(before):
                raise unsteady(i)
            answers.append((len(prompt), end_of_turn(text, len(prompt), tokenizer)))
    whole = render(dialogue, tokenizer)
    if not whole.startswith(text):
        raise unsteady(len(dialogue) - 1)
    return whole, answers


def prompts(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the assistant may be shown before it writes: some templates open a thought for it, or leave one out."""
    if not dialogue:
        raise BadRecordError("the assistant has the first word", "Put before it what it answers, or drop the line.")
    yield render(dialogue, tokenizer, add_generation_prompt=True)
    yield render(dialogue, tokenizer, add_generation_prompt=True, enable_thinking=False)


def unsteady(i: int) -> BadRecordError:
    return BadRecordError(
        f"the chat template writes what precedes message {i + 1} in another way once that is there",
        "Give dialogues with one answer each, or a tokenizer with a template that only adds to what it wrote.",
    )


def render(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(dialogue, chat_template=own_template(tokenizer), tokenize=False, **settings)
        )
    except Exception as error:  # a template is a program, which raises what it likes
        raise BadRecordError(
            f"the tokenizer's chat template fails on it ({type(error).__name__}: {first_line(error)})",
            "Mend the line, or the template.",
        ) from error


def end_of_turn(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Behind the first mark that is no thought's; without a mark, all that the template wrote is the turn."""
    ends = (found.end() for found in marks(tokenizer).finditer(text, start) if found[0] not in THOUGHT)
    return next(ends, len(text))


@functools.lru_cache(maxsize=2)
def marks(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    every = {*added, *tokenizer.all_special_tokens}
    return re.compile("|".join(re.escape(mark) for mark in sorted(every, key=len, reverse=True)) or "(?!)")


def tokenize_marked(text: str, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Any:
    """The tokens of a text in which marks are marks."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False, **settings)


def refuse_marks(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> None:
    """A mark that a message spells would end its turn: in what a template has written they are all alike."""
    for number, message in enumerate(dialogue, 1):
        for mark in marks(tokenizer).findall("\n".join(message.get(field, "") for field in RENDERED)):
            if mark not in THOUGHT or message["role"] != "assistant":
                raise BadRecordError(
                    f"message {number} spells {mark}, a special token of the tokenizer",
                    "Write it in another way, or drop the line.",
                )


def refuse_losses(dialogue: Dialogue, text: str) -> None:
    for number, message in enumerate(dialogue, 1):
        for field in RENDERED:
            said = message.get(field, "").strip()
            if said not in text and THOUGHT[1] not in said:  # around thoughts, templates change the blanks
                raise BadRecordError(
                    f"the tokenizer's chat template leaves out the {field} of message {number}",
                    "Empty it, or give a tokenizer with a template that takes it.",
                )
