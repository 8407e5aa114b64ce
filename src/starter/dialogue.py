"""Chat records: what a line of JSONL must hold to be a dialogue."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starter.config import RecipeError

T = TypeVar("T")
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
TEXTS = ("content", "reasoning_content")  # what a message says …
OLD = {"function_call": "tool_calls", "functions": "tools"}  # … and what no template renders


@dataclass(frozen=True)
class Dialogue:
    """Messages as chat templates take them, and the tools that the assistant may call, if any."""

    messages: list[Message]
    tools: list[Any] | None = None  # tables, as an API describes tools

    def until(self, end: int) -> Dialogue:
        return Dialogue(self.messages[:end], self.tools)


def read_chat(path: Path) -> list[Dialogue]:
    return read_lines(path, parse_dialogue)


def read_lines(path: Path, parse: Callable[[bytes], T]) -> list[T]:
    """Read JSONL: ``{"messages": [{"role": …, "content": …}, …], "tools": […]}``. No bad line is skipped."""
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
        messages = [parse_message(message) for message in record["messages"]]
        tools = record.get("tools") or None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecordError(
            f"not a chat record ({type(error).__name__}: {error})",
            'Write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}.',
        ) from error
    for old, new in OLD.items():
        if any(table.get(old) for table in (record, *messages)):
            raise BadRecordError(f"it has {old}, which would be left out", f"Write {new}, or drop the line.")
    for message in messages:
        check_message(message)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecordError("its tools are no list of tables", "Describe each tool in a table of its own.")
    check_text("its tools", json.dumps(tools, ensure_ascii=False))
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecordError("no message of the assistant to learn from", "Add one or drop the line.")
    return Dialogue(messages, tools)


def parse_message(message: Message) -> Message:
    """What is null or empty is as good as not there. Raises ValueError, KeyError, TypeError or AttributeError."""
    parsed = {name: value for name, value in message.items() if value or name in ("role", "content")}
    if "tool_calls" in parsed:
        called = [parse_call(call) for call in parsed["tool_calls"]]
        parsed |= {"content": message.get("content") or "", "tool_calls": called}
    return {"role": parsed.pop("role"), "content": parsed.pop("content"), **parsed}


def parse_call(call: dict[str, Any]) -> dict[str, Any]:
    """With the arguments as a table, which templates want; an API writes them as JSON in a string."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict) or not isinstance(function["name"], str):
        raise ValueError("a tool call has a name and a table of arguments")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def check_message(message: Message) -> None:
    if message["role"] not in ROLES:
        raise BadRecordError(f"unknown role {message['role']!r}", f"Use {', '.join(ROLES)}.")
    for field in TEXTS:
        if not isinstance(message.get(field, ""), str):
            raise BadRecordError(f"the {field} of a message is not a string", "Put its text there.")
        check_text(f"the {field} of a message", message.get(field, ""))
    check_text("a tool call", calls(message))


def calls(message: Message) -> str:
    """A message's tool calls, as one text in which each string of theirs stands."""
    return json.dumps(message.get("tool_calls", []), ensure_ascii=False)


def check_text(what: str, text: str) -> None:
    if not is_unicode(text):
        raise BadRecordError(f"{what} {HALF_A_PAIR[0]}", HALF_A_PAIR[1])


HALF_A_PAIR = ("holds half of a surrogate pair", "Mend that line: half a character is no text.")


def is_unicode(text: str) -> bool:
    r"""Not so with \ud800 alone, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
