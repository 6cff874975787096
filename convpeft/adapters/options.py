"""Options of adapter kinds: frozen dataclasses, checked against their annotations when read from a spec or a file."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal

from ..errors import OptionError, closest, shown

MOST = 2**16  # of a rank and of all that sets the size of an adapter
MOST_SIZES = 64  # branches or experts of an adapter
_WIDEST = 2**17  # kernel size of a branch
_MOST_WHOLE = 2**63 - 1  # of any whole number: tensors hold no more
_LARGEST = 3.4e38  # of a number with a fraction: float32 holds no more
_DEEP = 16  # levels of a nested value in which numpy's numbers are looked for


@dataclass(frozen=True)
class AdapterOptions:
    """The base class of a kind's options, a frozen dataclass; annotations give the types, ``problems`` the ranges.

    Options that came after a kind's first files are named in ``later``: they are written to files only where they are not
    the default, so that files say what they said before.
    """

    later: ClassVar[tuple[str, ...]] = ()

    def problems(self) -> Iterator[str]:
        """Yield one sentence for each value that is out of range."""
        return iter(())


def positive(options: AdapterOptions, *names: str) -> Iterator[str]:
    """Yield a sentence for each named option that is not above zero (None is allowed), or a whole number above ``MOST``."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            yield f"{name} must be above 0, not {shown(value)}"
        elif isinstance(value, int) and value > MOST:
            yield f"{name} must be at most {MOST:,}, not {shown(value)}"


def probability(options: AdapterOptions, *names: str) -> Iterator[str]:
    """Yield a sentence for each named option outside ``[0, 1)``."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < 1:
            yield f"{name} must be at least 0 and below 1, not {shown(value)}"


def odd_kernels(sizes: tuple[int, ...]) -> Iterator[str]:
    """Yield a sentence for each kernel size that is even or below 1, and one if there are none."""
    if not sizes:
        yield "kernel_sizes must name at least one size"
    if len(sizes) > MOST_SIZES:
        yield f"kernel_sizes must be at most {MOST_SIZES} sizes, not {len(sizes):,}"
        return
    for size in sizes:
        if size < 1 or size % 2 == 0:
            yield f"kernel_sizes must be odd and at least 1 (a centre is needed), not {shown(size)}"
        elif size > _WIDEST:
            yield f"kernel_sizes must be at most {_WIDEST:,}, not {shown(size)}"


def plain(value: Any) -> Any:
    """Return a value with numpy's numbers and arrays as Python's own, which a file can hold; all else is as it was.

    Example:
        >>> import numpy
        >>> plain((numpy.int64(8), numpy.array([3, 5])))
        (8, [3, 5])
    """
    return _plain(value, {}, _DEEP)


def _plain(value: Any, seen: dict[int, Any], levels: int) -> Any:
    """Return ``plain(value)``; what holds itself, or is nested deeper than ``levels``, stays as it was there."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    if type(value) not in (list, tuple, dict) or levels == 0:
        return value
    if id(value) not in seen:
        seen[id(value)] = value
        if type(value) is dict:
            seen[id(value)] = {key: _plain(each, seen, levels - 1) for key, each in value.items()}
        else:
            seen[id(value)] = type(value)(_plain(each, seen, levels - 1) for each in value)
    return seen[id(value)]


def read_options(
    kind: str, options: type[AdapterOptions], raw: Mapping[str, Any]
) -> tuple[AdapterOptions | None, list[OptionError]]:
    """Return a kind's checked options and no problems, or None and every problem found.

    Args:
        kind: the kind's name, for the error texts.
        options: the kind's options class.
        raw: the options as read from a spec file; lists are converted to tuples.
    """
    known = {field.name: field for field in fields(options)}
    hints = hints_of(options)  # type: ignore[arg-type]
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if not isinstance(key, str):
            problems.append(f"keys of kind {kind!r} are texts, not {shown(key)}")
            continue
        given: Any = plain(value)
        given = tuple(given) if isinstance(given, list) else given
        if key not in known:
            near = closest(key, known)
            hint = f"Closest: {near}. " if near else ""
            problems.append(
                f"unknown key {shown(key)} for kind {kind!r}. {hint}Its options: {', '.join(known) or 'none'}."
            )
        elif not fits(given, hints[key]):
            problems.append(f"{key} of kind {kind!r} must be {_type_in_words(hints[key])}, not {shown(given)}")
        else:
            values[key] = float(given) if hints[key] is float else given
    missing = [key for key, field in known.items() if _required(field) and key not in raw]
    problems += [f"kind {kind!r} needs the key {key!r}" for key in missing]
    checked = None if problems else options(**values)
    if checked is not None:
        problems = [f"kind {kind!r}: {problem}" for problem in checked.problems()]
    return (None if problems else checked), [OptionError(problem) for problem in problems]


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass, resolved to types."""
    return typing.get_type_hints(kind)


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from a file has an annotated type; an int is a float too, a bool is neither."""
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and -_MOST_WHOLE <= value <= _MOST_WHOLE
    if hint is str or hint is bool:
        return isinstance(value, hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(isinstance(value, type(argument)) and value == argument for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is tuple:
        sized = arguments[-1] is ... or (isinstance(value, tuple) and len(value) == len(arguments))
        return isinstance(value, tuple) and sized and all(fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return isinstance(value, hint)


def _type_in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_in_words, arguments))
    if origin is tuple:
        return f"a list of {_type_in_words(arguments[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, str(hint))
