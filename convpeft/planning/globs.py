"""Globs over dotted module names.

``*``, ``?`` and ``[...]`` stay inside one part of a name, ``**`` crosses any number of parts (also none: ``neck.**``
is ``neck`` and all below it), ``{a,b}`` alternates, a leading ``!`` excludes, no wildcard means that very name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from ..errors import PatternError

_WILD = re.compile(r"[*?\[]")

_MOST_ALTERNATIVES = 4096


def matches(pattern: str, name: str) -> bool:
    """Return whether ``name`` (dotted; the root is the empty name) matches ``pattern`` (without a leading ``!``).

    Raises:
        PatternError: for unbalanced brackets or braces.

    Example:
        >>> matches("neck.**.conv", "neck.top.0.conv"), matches("neck.*.conv", "neck.top.0.conv")
        (True, False)
        >>> matches("model.{12,15}.cv[12]", "model.15.cv2"), matches("**", "")
        (True, True)
    """
    return compile_glob(pattern).fullmatch(name + "." if name else "") is not None


def is_literal(pattern: str) -> bool:
    """Return whether the pattern names modules exactly (alternation allowed, no wildcard).

    Example:
        >>> is_literal("model.{12,15}"), is_literal("model.*")
        (True, False)
    """
    return not _WILD.search(pattern)


@lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a glob, to be matched in full against ``name + "."``.

    Raises:
        PatternError: for unbalanced brackets or braces.
    """
    alternatives = _expand(pattern, pattern)
    return re.compile("|".join(f"(?:{_translate(alternative, pattern)})" for alternative in alternatives))


def _expand(pattern: str, whole: str) -> list[str]:
    """Expand the braces of a pattern, nested ones too."""
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise PatternError(f"pattern {whole!r} closes a brace it never opened")
        return [pattern]
    depth, pieces, last = 0, [], start + 1
    for position in range(start, len(pattern)):
        character = pattern[position]
        depth += (character == "{") - (character == "}")
        if (character == "," and depth == 1) or depth == 0:
            pieces.append(pattern[last:position])
            last = position + 1
        if depth == 0:
            rest = pattern[position + 1 :]
            expanded = [full for piece in pieces for full in _expand(pattern[:start] + piece + rest, whole)]
            if len(expanded) > _MOST_ALTERNATIVES:
                raise PatternError(f"pattern {whole!r} has more than {_MOST_ALTERNATIVES} alternatives")
            return expanded
    raise PatternError(f"pattern {whole!r} opens a brace it never closes")


def _translate(pattern: str, whole: str) -> str:
    if pattern == "":
        return ""
    if any(part == "" for part in _parts(pattern)):
        raise PatternError(f"pattern {whole!r} has an empty part (two dots in a row, or one at an end)")
    return "".join(r"(?:[^.]+\.)*" if part == "**" else _part(part, whole) + r"\." for part in _parts(pattern))


def _parts(pattern: str) -> Sequence[str]:
    return pattern.split(".")


def _part(part: str, whole: str) -> str:
    result, position = "", 0
    while position < len(part):
        character = part[position]
        position += 1
        if character == "*":
            result += "[^.]*"
        elif character == "?":
            result += "[^.]"
        elif character == "[":
            end = part.find("]", position + 1)
            if end < 0:
                raise PatternError(f"pattern {whole!r} opens a bracket it never closes")
            body = part[position:end]
            negated = body[0] in "!^"
            result += f"(?!\\.)[{'^' if negated else ''}{_choice(body[negated:], whole)}]"
            position = end + 1
        else:
            result += re.escape(character)
    return result


def _choice(body: str, whole: str) -> str:
    """Return the inside of a bracket as that of a regular expression: single characters and ranges."""
    if not body:
        raise PatternError(f"pattern {whole!r} has an empty bracket")
    result, position = "", 0
    while position < len(body):
        span = body[position : position + 3]
        if len(span) == 3 and span[1] == "-":
            if span[0] > span[2]:
                raise PatternError(f"pattern {whole!r} has a range that runs backwards, {span!r}")
            result += f"{re.escape(span[0])}-{re.escape(span[2])}"
            position += 3
        else:
            result += re.escape(span[0])
            position += 1
    return result
