"""Chat records: what a line of JSONL must hold to be a dialogue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from starter.config import RecipeError

T = TypeVar("T")
Dialogue = list[dict[str, str]]

ROLES = ("system", "user", "assistant")
RENDERED = ("content", "reasoning_content")  # what a message says …
NOT_RENDERED = ("tool_calls", "function_call", "tools", "functions")  # … and what no recipe here renders


def read_chat(path: Path) -> list[Dialogue]:
    return read_lines(path, parse_dialogue)


def read_lines(path: Path, parse: Callable[[bytes], T]) -> list[T]:
    """Read JSONL: ``{"messages": [{"role": …, "content": …}, …]}``. A bad line is an error: none is skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecipeError(
            f"cannot read the data file {path}: {error.strerror}.\nSee data.train and data.val."
        ) from error
    parsed = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                parsed.append(parse(line))
            except BadRecordError as error:
                raise RecipeError(f"{path}:{number}: {error.what}.\n{error.fix}") from error
    if not parsed:
        raise RecipeError(f"{path} holds no dialogue.\nPut one JSON object with messages on each line.")
    return parsed


class BadRecordError(ValueError):
    """What is wrong with a record, wherever it stands, and what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def parse_dialogue(line: bytes) -> Dialogue:
    try:
        record = json.loads(line)
        messages = record["messages"]
        dialogue = [{"role": message["role"], "content": message["content"]} for message in messages]
        tables = [record, *messages]
        for message, parsed in zip(messages, dialogue, strict=True):
            if message.get("reasoning_content"):
                parsed["reasoning_content"] = message["reasoning_content"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecordError(
            f"not a chat record ({type(error).__name__}: {error})",
            'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.',
        ) from error
    for field in NOT_RENDERED:
        if any(table.get(field) for table in tables):
            raise BadRecordError(f"it has {field}, which would be left out", "Empty that, or drop the line.")
    for message in dialogue:
        check_message(message)
    if all(message["role"] != "assistant" for message in dialogue):
        raise BadRecordError("no message of the assistant to learn from", "Add one or drop the line.")
    return dialogue


def check_message(message: dict[str, str]) -> None:
    if message["role"] not in ROLES:
        raise BadRecordError(f"unknown role {message['role']!r}", f"Use {', '.join(ROLES)}.")
    for field in RENDERED:
        text = message.get(field, "")
        if not isinstance(text, str):
            raise BadRecordError(f"the {field} of a message is not a string", "Put its text there.")
        if not is_unicode(text):
            raise BadRecordError(f"the {field} of a message {HALF_A_PAIR[0]}", HALF_A_PAIR[1])


HALF_A_PAIR = ("holds half of a surrogate pair", "Mend that line: half a character is no text.")


def is_unicode(text: str) -> bool:
    r"""Not so with \ud800 alone, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
