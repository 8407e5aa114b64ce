"""Rules that both planes enforce: which fields an object may have, and what Kubernetes makes of its text.

`check` refuses what the API does not know, as the servers' strict decoders do. A shape (see fields.py) is a type, a
set of allowed words, `[shape]` for a list, `{field: shape}` for an object, `{"*": shape}` for a map. Null counts as
"not given". `expand` is Kubernetes' own rewriting of `$(NAME)` and `$$` in environment values, command and args.
Sizes are of the object as JSON without blanks, which is how it is stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from .server import Refusal

OBJECT_LIMIT = 1536 * 1024  # etcd --max-request-bytes
ENV_NAME = re.compile(r"[A-Za-z._-][A-Za-z0-9._-]*")
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def check(value: Any, shape: Any, where: str) -> None:
    """Refuse what is not of this shape."""
    if value is None:
        return
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise Refusal(400, f"{where} must be an object")
        for name, item in value.items():
            if name not in shape and "*" not in shape:
                raise Refusal(400, f'json: unknown field "{name}" in {where}')
            check(item, shape.get(name, shape.get("*")), f"{where}.{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise Refusal(400, f"{where} must be a list")
        for number, item in enumerate(value):
            if item is None:
                raise Refusal(400, f"{where}[{number}] must not be null")
            check(item, shape[0], f"{where}[{number}]")
    elif isinstance(shape, frozenset):
        if value not in shape:
            raise Refusal(400, f"{where} must be one of {', '.join(sorted(shape))}")
    else:
        fits = isinstance(value, (int, float)) if shape is float else isinstance(value, shape)
        if not fits or (isinstance(value, bool) and shape is not bool):
            raise Refusal(400, f"{where} must be a {NAMES[shape]}")


def check_env_names(entries: list[dict[str, Any]], where: str) -> None:
    """Every entry has a name that Kubernetes takes, and no name comes twice."""
    seen = set()
    for number, entry in enumerate(entries):
        name = entry.get("name")
        if not name or not ENV_NAME.fullmatch(name):
            raise Refusal(400, f"{where}[{number}].name {name!r} is not a valid environment variable name")
        if name in seen:
            raise Refusal(400, f"{where}: duplicate name {name!r}")
        seen.add(name)


def check_object_size(document: Any, limit: int = OBJECT_LIMIT) -> None:
    """Refuse, in etcd's words, what etcd would not store."""
    if len(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()) > limit:
        raise Refusal(500, "etcdserver: request is too large")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """$(NAME) becomes its value where there is one and stays as it is where not; $$ becomes $."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


def expand_environment(pairs: list[tuple[str, str, bool]]) -> dict[str, str]:
    """Kubernetes' order: a value sees the variables before it; what comes from a reference is not rewritten."""
    result: dict[str, str] = {}
    for name, value, literal in pairs:
        result[name] = value if literal else expand(value, result)
    return result
