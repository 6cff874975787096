"""The braces of a glob: how many alternatives they make, counted first, and the alternatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..errors import PatternError, shown

SPECIAL = "*?[]{},@"  # brackets around one of these quote it

_DEEPEST = 50  # braces in braces

_Made = TypeVar("_Made")


def class_end(pattern: str, start: int) -> int:
    """Return where the bracket that opens at ``start`` closes, or -1: its first letter may be ``]``, none is a dot."""
    end = pattern.find("]", start + 2)
    return -1 if end >= 0 and "." in pattern[start:end] else end


def measure(pattern: str) -> tuple[int, int]:
    """Return how many alternatives the braces of a pattern make, and how many letters these have together.

    Raises:
        PatternError: for unbalanced braces, or braces too deep in one another.
    """

    def joined(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int]:
        return before[0] * after[0], before[1] * after[0] + after[1] * before[0]

    def either(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
        return one[0] + other[0], one[1] + other[1]

    return _fold(pattern, lambda text: (1, len(text)), joined, either)


def expand(pattern: str) -> list[str]:
    """Return the alternatives of a pattern, which has been measured.

    Example:
        >>> expand("model.{12,15}.cv{1,[,]}")
        ['model.12.cv1', 'model.12.cv[,]', 'model.15.cv1', 'model.15.cv[,]']
    """

    def joined(before: list[str], after: list[str]) -> list[str]:
        return [first + second for first in before for second in after]

    return _fold(pattern, lambda text: [text], joined, lambda one, other: one + other)


def _fold(
    pattern: str,
    text: Callable[[str], _Made],
    joined: Callable[[_Made, _Made], _Made],
    either: Callable[[_Made, _Made], _Made],
) -> _Made:
    """Return what a pattern makes, put together from its plain texts; brackets hide braces and commas in them."""
    open_ones: list[tuple[_Made, _Made | None]] = []  # what stands before each open brace, and its finished choices
    made, choices, position = text(""), None, 0
    while position < len(pattern):
        end = _end_of_text(pattern, position, inside=bool(open_ones))
        if end > position:
            made, position = joined(made, text(pattern[position:end])), end
            continue
        character, position = pattern[position], position + 1
        if character == "{":
            if len(open_ones) == _DEEPEST:
                raise PatternError(f"pattern {shown(pattern)} has braces in more than {_DEEPEST} others")
            open_ones.append((made, choices))
            made, choices = text(""), None
        elif not open_ones:
            raise PatternError(
                f"pattern {shown(pattern)} closes a brace it never opened (a brace in a name is written [}}])"
            )
        else:
            choices = made if choices is None else either(choices, made)
            made = text("")
            if character == "}":
                before, outer = open_ones.pop()
                made, choices = joined(before, choices), outer
    if open_ones:
        raise PatternError(
            f"pattern {shown(pattern)} opens a brace it never closes (a brace in a name is written [{{])"
        )
    return made


def _end_of_text(pattern: str, position: int, *, inside: bool) -> int:
    """Return where the plain text that begins here ends: at a brace, or at a comma inside of one."""
    while position < len(pattern):
        character = pattern[position]
        if character in "{}" or (inside and character == ","):
            break
        end = class_end(pattern, position) if character == "[" else -1
        position = max(position, end) + 1
    return position
