"""Globs by backtracking, one character and one part at a time."""

from __future__ import annotations


def expand(pattern: str) -> list[str]:
    """Return the alternatives of a pattern with balanced braces, the innermost group replaced first."""
    close = pattern.find("}")
    if close < 0:
        return [pattern]
    start = pattern.rindex("{", 0, close)
    options = pattern[start + 1 : close].split(",")
    return [full for option in options for full in expand(pattern[:start] + option + pattern[close + 1 :])]


def matches(pattern: str, name: str) -> bool:
    """Return whether a dotted name matches a pattern of ``*``, ``?``, ``[...]``, ``**`` and ``{a,b}``."""
    parts = name.split(".") if name else []
    return any(_parts_match(p.split(".") if p else [], parts) for p in expand(pattern))


def _parts_match(pattern: list[str], parts: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_parts_match(pattern[1:], parts[skipped:]) for skipped in range(len(parts) + 1))
    return bool(parts) and _part_matches(pattern[0], parts[0]) and _parts_match(pattern[1:], parts[1:])


def _part_matches(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(_part_matches(pattern[1:], text[skipped:]) for skipped in range(len(text) + 1))
    if not text:
        return False
    if pattern[0] == "[":
        end = pattern.index("]", 2)
        body = pattern[1:end]
        negated = body[0] in "!^"
        if _in_class(body[1:] if negated else body, text[0]) == negated:
            return False
        return _part_matches(pattern[end + 1 :], text[1:])
    return pattern[0] in ("?", text[0]) and _part_matches(pattern[1:], text[1:])


def _in_class(body: str, character: str) -> bool:
    while body:
        if len(body) > 2 and body[1] == "-":
            if body[0] <= character <= body[2]:
                return True
            body = body[3:]
        else:
            if body[0] == character:
                return True
            body = body[1:]
    return False
