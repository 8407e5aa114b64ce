"""A tokenizer's own chat template: what it makes of a dialogue, and which part of that the assistant has to write."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from starter.dialogue import TEXTS, BadRecordError, Dialogue, Message, calls

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
    """A dialogue, or one of its turns behind those before it: token ids, and for each whether the loss counts it."""

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


def encode_by_template(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """One sequence, or several where the template writes earlier turns in another way as the dialogue goes on."""
    refuse_marks(dialogue, tokenizer)
    samples = render_answers(dialogue, tokenizer)
    refuse_losses(dialogue, [text for text, _ in samples], tokenizer)
    return [tokenize_answers(text, answers, tokenizer) for text, answers in samples]


def tokenize_answers(text: str, answers: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    found = tokenize_marked(text, tokenizer, return_offsets_mapping=True)
    counted = bytearray(len(text) + 1)  # for each place in the text, whether a token that ends there counts
    for start, end in answers:
        counted[start + 1 : end + 1] = b"\1" * (end - start)
    return Encoded(found["input_ids"], [bool(counted[end]) for _, end in found["offset_mapping"]])


def render_answers(
    dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts of the dialogue, and where in each the assistant writes: from its prompt to the mark that ends its turn.

    One text, as long as the template only adds to what it wrote. Many leave the thoughts of earlier turns out: there
    each answer is learned in the text as it was when it was given, behind the turns before it as they then looked.
    """
    samples: list[tuple[str, list[tuple[int, int]]]] = []
    answers: list[tuple[int, int]] = []
    text = ""
    for i, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            before, text = text, render(dialogue.until(i + 1), tokenizer)
            fitting = [prompt for prompt in prompts(dialogue.until(i), tokenizer) if text.startswith(prompt)]
            prompt = max(fitting, key=len, default=None)  # an empty thought that one of them brings is not learned
            if prompt is None:
                raise unsteady(i, "Give a tokenizer with a template whose prompt is what its answers begin with.")
            if answers and not prompt.startswith(before):
                samples.append((before, answers))
                answers = []
            answers.append((len(prompt), end_of_turn(text, len(prompt), message, tokenizer)))
    whole = text if message["role"] == "assistant" else render(dialogue, tokenizer)
    if not whole.startswith(text):
        raise unsteady(len(dialogue.messages) - 1, "Drop what follows the last answer.")
    return [*samples, (whole, answers)]


def prompts(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the assistant may be shown before it writes: some templates open a thought for it, or leave one out."""
    if not dialogue.messages:
        raise BadRecordError("the assistant has the first word", "Put before it what it answers, or drop the line.")
    yield render(dialogue, tokenizer, add_generation_prompt=True)
    off = {"enable_thinking": False}
    yield render(dialogue, tokenizer, add_generation_prompt=True, chat_template_kwargs=off, **off)  # some read one


def unsteady(i: int, fix: str) -> BadRecordError:
    return BadRecordError(
        f"the chat template writes what precedes message {i + 1} in another way once that is there", fix
    )


def render(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                dialogue.messages,
                tools=dialogue.tools,
                chat_template=own_template(tokenizer),
                tokenize=False,
                **settings,
            )
        )
    except Exception as error:  # a template is a program, which raises what it likes
        raise BadRecordError(
            f"the tokenizer's chat template fails on it ({type(error).__name__}: {first_line(error)})",
            "Mend the line, or the template.",
        ) from error


def end_of_turn(text: str, start: int, message: Message, tokenizer: PreTrainedTokenizerBase) -> int:
    """Behind the first mark that is no thought's, or the last one where tool calls have marks of their own; without a
    mark, all that the template wrote is the turn."""
    ends = [found.end() for found in marks(tokenizer).finditer(text, start) if found[0] not in THOUGHT] or [len(text)]
    return ends[-1 if "tool_calls" in message else 0]


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
    spelled = [("one of its tools", json.dumps(dialogue.tools, ensure_ascii=False), False)]
    for number, message in enumerate(dialogue.messages, 1):
        text = "\n".join([*(message.get(field, "") for field in TEXTS), calls(message)])
        spelled.append((f"message {number}", text, message["role"] == "assistant"))
    for what, text, may_think in spelled:
        for mark in marks(tokenizer).findall(text):
            if mark not in THOUGHT or not may_think:
                raise BadRecordError(
                    f"{what} spells {mark}, a special token of the tokenizer",
                    "Write it in another way, or drop the line.",
                )


def refuse_losses(dialogue: Dialogue, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """What was said must stand in one of the texts, and tools must make a difference to them."""
    for i, message in enumerate(dialogue.messages):
        for field in TEXTS:
            said = message.get(field, "").strip()
            if THOUGHT[1] not in said and not any(said in text for text in texts):  # at thoughts, they change blanks
                raise left_out(f"the {field} of message {i + 1}")
        if "tool_calls" in message:
            without = {name: value for name, value in message.items() if name != "tool_calls"}
            if same(dialogue.until(i + 1), Dialogue([*dialogue.messages[:i], without], dialogue.tools), tokenizer):
                raise left_out(f"the tool_calls of message {i + 1}")
    if dialogue.tools and same(dialogue, Dialogue(dialogue.messages), tokenizer):
        raise left_out("its tools")


def same(one: Dialogue, other: Dialogue, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template makes the same text of both."""
    try:
        return render(one, tokenizer) == render(other, tokenizer)
    except BadRecordError:  # it has looked at what the other lacks
        return False


def left_out(what: str) -> BadRecordError:
    return BadRecordError(
        f"the tokenizer's chat template leaves out {what}",
        "Empty it, or give a tokenizer with a template that takes it.",
    )
