"""Every error convpeft raises; each also inherits the builtin a caller would catch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

_MOST_SHOWN = 200  # characters of one value in an error text
_MOST_ITEMS = 6  # of a list or a mapping in an error text
_MOST_LISTED = 100  # problems in one error text
_MOST_TEXT = 16_000  # characters of it
_MOST_COMPARED = 200  # characters of a name that nearest names are searched for


class ConvPeftError(Exception):
    """The base class of every error this library raises."""


class SpecError(ConvPeftError, ValueError):
    """A spec asks for something that cannot be done; the text lists all its problems at once."""


class PatternError(SpecError):
    """A pattern matches nothing, nothing its kind can serve, or nothing that earlier rules left."""


class OptionError(SpecError):
    """An option of a rule is unknown, of the wrong type or out of range."""


class UnknownKind(SpecError, LookupError):
    """A rule names an adapter kind that is not registered."""


class RegistrationError(ConvPeftError, ValueError):
    """``register_adapter`` was given a name that is taken or a class that is not an adapter."""


class ShapeMismatch(ConvPeftError, ValueError):
    """Two tensors that should fit each other do not."""


class GeometryError(ConvPeftError, ValueError):
    """A layer is not a convolution that convpeft can describe, or two convolutions do not compose."""


class HostError(ConvPeftError, TypeError):
    """A module cannot host an adapter, or an operation on it would lose its adapter."""


class StateError(ConvPeftError, RuntimeError):
    """The model is not in the state the call needs (nothing injected, a name in use, a layer missing)."""


class UnknownAdapter(StateError, LookupError):
    """The model has no adapter of that name."""


class AdapterConflict(StateError):
    """Two adapters that replace the same tensors cannot be active together."""


class MergeError(ConvPeftError, RuntimeError):
    """A layer cannot be merged; ``reasons`` maps each such layer to the reason."""

    def __init__(self, message: str, reasons: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class NotMergeable(MergeError):
    """An adapter has no equivalent convolution (it is not linear, or depends on its input)."""


class AdapterFileError(ConvPeftError, ValueError):
    """A file is not a valid adapter file, or does not fit this model."""


class BaseMismatch(AdapterFileError):
    """An adapter file was made on another base model; ``layers`` names those that differ."""

    def __init__(self, message: str, layers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


def closest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates most like ``name``, joined by commas, or an empty string when none is close."""
    if len(name) > _MOST_COMPARED:
        return ""
    near = difflib.get_close_matches(name, [each for each in candidates if isinstance(each, str)], n=count, cutoff=0.4)
    return ", ".join(near)


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Return names joined by commas; those after the first ``limit`` are replaced by their count."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} (+{len(names) - limit} more)"


def shown(value: Any) -> str:
    """Return ``repr(value)`` for an error text; of a long, deep or broken value only as much as is fit to read.

    What is left out is never built: the ``repr`` of a small nested value can be larger than memory.

    Example:
        >>> shown([3, "a"]), shown(list(range(1000)))
        ("[3, 'a']", '[0, 1, 2, 3, 4, 5, ...]')
    """
    try:
        text = _shown(value, 3)
    except Exception:  # its own __repr__ or __len__ raises
        text = f"<{type(value).__name__}>"
    return brief(text)


def brief(text: str) -> str:
    """Return a text, cut if it is long."""
    return text if len(text) <= 2 * _MOST_SHOWN else f"{text[: 2 * _MOST_SHOWN]}..."


def _shown(value: Any, levels: int) -> str:
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= _MOST_SHOWN else f"{value[: _MOST_SHOWN // 2]!r}... ({len(value):,} long)"
    if isinstance(value, int) and value.bit_length() > 256:  # repr refuses some thousands of digits
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    if not isinstance(value, (list, tuple, set, frozenset, dict)) or not value:
        return repr(value)
    opening, closing = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
    if levels == 0:
        return f"{opening}...{closing}"
    items: Iterator[str] = (_shown(item, levels - 1) for item in value)
    if isinstance(value, dict):
        items = (f"{_shown(key, levels - 1)}: {_shown(item, levels - 1)}" for key, item in value.items())
    texts = [*islice(items, _MOST_ITEMS), *(["..."] if len(value) > _MOST_ITEMS else [])]
    only = "," if opening == "(" and len(value) == 1 else ""
    return f"{opening}{', '.join(texts)}{only}{closing}"


def raise_problems(problems: Sequence[SpecError], heading: str) -> None:
    """Raise one error that lists all ``problems``: of their common class, or ``SpecError`` when the classes differ."""
    if not problems:
        return
    classes = {type(problem) for problem in problems}
    error = classes.pop() if len(classes) == 1 else SpecError
    if len(problems) == 1:
        raise error(f"{heading}: {problems[0]}")
    lines, letters = [], 0
    for number, problem in enumerate(problems[:_MOST_LISTED], 1):
        lines.append(f"  {number}. {problem}")
        letters += len(lines[-1])
        if letters > _MOST_TEXT:
            break
    rest = len(problems) - len(lines)
    lines += [f"  and {rest:,} more like these"] if rest else []
    raise error("\n".join([f"{heading}: {len(problems)} problems, nothing was changed.", *lines]))
