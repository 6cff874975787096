"""How large a spec may be: counted while it is read, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ..errors import SpecError

MOST_BYTES = 4 * 2**20  # of a spec file
MOST_RULES = 10_000  # of rules and unfreeze entries
MOST_PATTERNS = 20_000  # of all rules and entries, aliases written out
MOST_LETTERS = 1_000_000  # of all patterns, their braces written out
_MOST_VALUES = 200_000  # in a spec; what an alias of YAML stands for counts each time
_DEEPEST = 20  # lists and mappings in one another; a spec has five
_FAST_FROM = 100_000  # letters of YAML

_Fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast

_TOO_MANY = f"it has more than {_MOST_VALUES:,} values (each use of an anchor counts all that it stands for)"
_TOO_DEEP = f"it has lists or mappings more than {_DEEPEST} deep in one another, or one that contains itself"


def is_long(text: str) -> bool:
    """Return whether a YAML text is to be read with the faster loader."""
    return len(text) > _FAST_FROM


def check_yaml(text: str) -> None:
    """Raise a SpecError for a text with too many values, or values too deep; nothing is made of it.

    Raises:
        YAMLError: if it is no YAML.
    """
    try:
        _check_events(text, _Fast)
    except yaml.YAMLError:
        if is_long(text) or _Fast is yaml.SafeLoader:
            raise
        _check_events(text, yaml.SafeLoader)  # the two differ in rare details


def _check_events(text: str, loader: Any) -> None:
    anchors: dict[str | None, int] = {}
    open_ones: list[tuple[str | None, int]] = []  # anchor, and the values before it
    count = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, count))
            count += 1
            if len(open_ones) > _DEEPEST:
                raise SpecError(_TOO_DEEP)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor is not None:
                anchors[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_ones):
                raise SpecError(_TOO_DEEP)
            count += anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
        if count > _MOST_VALUES:
            raise SpecError(_TOO_MANY)


def check_data(data: Any) -> None:
    """Raise a SpecError for plain data with too many values, or values too deep; a value in two places counts twice."""
    count, level = 0, [data]
    for _ in range(_DEEPEST + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, (Mapping, list, tuple)):
                count += len(value)
                if count > _MOST_VALUES:
                    raise SpecError(_TOO_MANY)
                below.extend(value.values() if isinstance(value, Mapping) else value)
        if not below:
            return
        level = below
    raise SpecError(_TOO_DEEP)
