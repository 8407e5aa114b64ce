"""The verifiable reward of data/prep/rl's rows: is the number at the end of an answer the one that is expected?"""

from __future__ import annotations

import re
from fractions import Fraction

RIGHT, A_NUMBER = 1.0, 0.1  # for the right answer, and for an answer that at least ends in a number
NUMBER = re.compile(r"-?\d{1,40}(?:\.\d{1,40}|/\d{1,40})?")


def number(text: str) -> Fraction | None:
    """The last number in a text, as it counts: 7, 7.0 and 14/2 are one."""
    found = NUMBER.findall(text)
    try:
        return Fraction(found[-1]) if found else None
    except ZeroDivisionError:
        return None


def is_right(answer: str, expected: str) -> bool:
    """Numbers are compared by value, all else as text without the blanks around it."""
    wanted = number(expected) if NUMBER.fullmatch(expected.strip()) else None
    return number(answer) == wanted if wanted is not None else answer.strip() == expected.strip()


def reward(answer: str, ended: bool, expected: str) -> float:
    """0 to 1. An answer that did not end in time earns nothing, whatever stands in it."""
    if not ended:
        return 0.0
    if is_right(answer, expected):
        return RIGHT
    return A_NUMBER if number(answer) is not None else 0.0
