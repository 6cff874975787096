"""Globs over dotted module names.

``*``, ``?`` and ``[...]`` stay inside one part of a name, ``**`` crosses any number of parts (also none: ``neck.**``
is ``neck`` and all below it), ``{a,b}`` alternates, a leading ``!`` excludes, no wildcard means that very name. Brackets
around one special character quote it: ``[[]``, ``[*]``, ``[{]``.

A match takes time in proportion to the pattern times the name, whatever they are: the parts between two wildcards are
matched where they first fit, and never tried again (what follows a wildcard can only gain by it). What a pattern's
braces multiply is counted before it is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

from ..errors import PatternError, shown
from .braces import SPECIAL, class_end, expand, measure

LONGEST = 10_000  # of one pattern
_MOST_ALTERNATIVES = 4096
_MOST_EXPANDED = 500_000  # letters of all alternatives together
_MOST_WILD = 40_000  # letters of those with wildcards: they are compiled
_STAR_COSTS = 6  # letters, when it is compiled


def matches(pattern: str, name: str) -> bool:
    """Return whether ``name`` (dotted; the root is the empty name) matches ``pattern`` (without a leading ``!``).

    Raises:
        PatternError: for unbalanced brackets or braces.

    Example:
        >>> matches("neck.**.conv", "neck.top.0.conv"), matches("neck.*.conv", "neck.top.0.conv")
        (True, False)
        >>> matches("model.{12,15}.cv[12]", "model.15.cv2"), matches("**", "")
        (True, True)
        >>> matches("branch[[]0]", "branch[0]"), matches("a[{]b[}]", "a{b}")
        (True, True)
    """
    return compile_glob(pattern).matches(name)


def is_literal(pattern: str) -> bool:
    """Return whether the pattern names modules exactly (alternation allowed, no wildcard).

    Example:
        >>> is_literal("model.{12,15}"), is_literal("model.*"), is_literal("branch[[]0]")
        (True, False, True)
    """
    return compile_glob(pattern).is_literal


def quoted(name: str) -> str:
    """Return the pattern that matches this very name, whatever letters it has.

    Example:
        >>> quoted("neck.0.conv"), quoted("branch[0].{a}"), quoted("!top")
        ('neck.0.conv', 'branch[[]0].[{]a[}]', '{!}top')
    """
    first, rest = ("{" + name[0] + "}", name[1:]) if name[:1] in ("!", "@") else ("", name)
    return first + re.sub(r"[*?\[{}]", lambda found: f"[{found[0]}]", rest)


class Glob:
    """A pattern whose braces are expanded.

    Attributes:
        names: what it names exactly.
        size: letters of all its alternatives together.
        is_literal: whether it names modules exactly, and nothing else.
    """

    def __init__(self, pattern: str) -> None:
        """Check and expand the pattern; see ``matches``."""
        if len(pattern) > LONGEST:
            raise PatternError(f"pattern {shown(pattern)} is too long: at most {LONGEST:,} letters")
        count, self.size = measure(pattern)
        if count > _MOST_ALTERNATIVES:
            raise PatternError(f"pattern {shown(pattern)} has more than {_MOST_ALTERNATIVES} alternatives")
        if self.size > _MOST_EXPANDED:
            raise PatternError(
                f"pattern {shown(pattern)} is too large with its braces written out; use several patterns"
            )
        split = [[_tokens(part, pattern) for part in _parts(each, pattern)] for each in expand(pattern)]
        exact = [parts for parts in split if all(_is_exact(part) for part in parts)]
        self.names = frozenset(".".join("".join(token.letter for token in part) for part in parts) for parts in exact)
        self.is_literal = len(exact) == len(split)
        self._wild = [parts for parts in split if not all(_is_exact(part) for part in parts)]
        steps = [token for parts in self._wild for part in parts for token in part]
        if len(steps) + _STAR_COSTS * sum(token is _STAR or token is _CROSSING[0] for token in steps) > _MOST_WILD:
            raise PatternError(f"pattern {shown(pattern)} has too many wildcards with its braces written out")

    def matches(self, name: str) -> bool:
        """Return whether a dotted name matches."""
        if name in self.names:
            return True
        return not self.is_literal and self._regex.fullmatch(name + "." if name else "") is not None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{alternative})" for alternative in _regexes(self._wild)))


@lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> Glob:
    """Return a pattern as a ``Glob``.

    Raises:
        PatternError: for unbalanced brackets or braces, and for patterns too large to match.
    """
    return Glob(pattern)


class _Token:
    """One step of a part: a letter, or one of a class of letters, or ``*``.

    Attributes:
        letter: the only one it matches, else empty.
        regex: its regular expression.
    """

    __slots__ = ("letter", "regex")

    def __init__(self, regex: str, letter: str = "") -> None:
        self.regex, self.letter = regex, letter


_Part = Sequence[_Token]
_STAR, _ANY = _Token("[^.]*"), _Token("[^.]")
_LETTERS: dict[str, _Token] = {}
_CROSSING: _Part = (_Token("(?:[^.]+\\.)*"),)


def _parts(pattern: str, whole: str) -> list[str]:
    """Return the parts of an alternative, none of them empty; the root has none."""
    parts = pattern.split(".") if pattern else []
    if "" in parts:
        raise PatternError(f"pattern {shown(whole)} has an empty part (two dots in a row, or one at an end)")
    return parts


def _tokens(part: str, whole: str) -> _Part:
    """Return the steps of one part of an alternative; stars in a row are one."""
    if part == "**":
        return _CROSSING
    found: list[_Token] = []
    position = 0
    while position < len(part):
        character = part[position]
        position += 1
        if character == "*":
            if not found or found[-1] is not _STAR:
                found.append(_STAR)
        elif character == "?":
            found.append(_ANY)
        elif character == "[":
            end = class_end(part, position - 1)
            if end < 0:
                raise PatternError(
                    f"pattern {shown(whole)} opens a bracket it never closes (a bracket in a name is written [[])"
                )
            found.append(_class(part[position:end], whole))
            position = end + 1
        else:
            found.append(_letter(character))
    return found


def _letter(character: str) -> _Token:
    token = _LETTERS.get(character)
    if token is None:
        token = _Token(re.escape(character), character)
        if len(_LETTERS) < 1024:
            _LETTERS[character] = token
    return token


def _class(body: str, whole: str) -> _Token:
    """Return the step for the inside of a bracket; one special character alone is that character."""
    if len(body) == 1 and body in SPECIAL:
        return _letter(body)
    negated = body[0] in "!^"
    return _Token(f"(?!\\.)[{'^' if negated else ''}{_choice(body[negated:], whole)}]")


def _choice(body: str, whole: str) -> str:
    """Return the inside of a bracket as that of a regular expression: single characters and ranges."""
    if not body:
        raise PatternError(f"pattern {shown(whole)} has an empty bracket")
    result, position = "", 0
    while position < len(body):
        span = body[position : position + 3]
        if len(span) == 3 and span[1] == "-":
            if span[0] > span[2]:
                raise PatternError(f"pattern {shown(whole)} has a range that runs backwards, {span!r}")
            result += f"{re.escape(span[0])}-{re.escape(span[2])}"
            position += 3
        else:
            result += re.escape(span[0])
            position += 1
    return result


def _is_exact(part: _Part) -> bool:
    return all(token.letter for token in part)


def _regexes(alternatives: Sequence[Sequence[_Part]]) -> Iterator[str]:
    """Yield the regular expression of each alternative; groups are numbered through all of them."""
    numbers = iter(range(1, _MOST_WILD))

    def at_first_fit(before: str, text: str) -> str:
        """Return what matches the fewest of ``before`` and then ``text``, and does not come back for more."""
        number = next(numbers)
        return f"(?=(?P<g{number}>{before}?{text}))(?P=g{number})"

    def one(part: _Part) -> str:
        start, *runs = _split(part, _STAR)
        if not runs:
            return _joined(start) + r"\."
        middle = "".join(at_first_fit(_STAR.regex, _joined(run)) for run in runs[:-1] if run)
        return _joined(start) + middle + _STAR.regex + _joined(runs[-1]) + r"\."

    for parts in alternatives:
        start, *runs = _split(parts, _CROSSING)
        result = "".join(map(one, start))
        if runs:
            result += "".join(at_first_fit(_CROSSING[0].regex, "".join(map(one, run))) for run in runs[:-1] if run)
            result += _CROSSING[0].regex + "".join(map(one, runs[-1]))
        yield result


def _joined(tokens: _Part) -> str:
    return "".join(token.regex for token in tokens)


def _split(items: Sequence, separator: object) -> list[list]:
    """Return the runs of items between separators, as ``str.split`` does."""
    runs: list[list] = [[]]
    for item in items:
        if item is separator:
            runs.append([])
        else:
            runs[-1].append(item)
    return runs
