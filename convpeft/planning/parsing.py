"""Read YAML and JSON, strict about keys said twice, and about how much there is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError, SpecError, brief, closest, shown
from .bounds import MOST_BYTES, MOST_RULES, check_data, check_yaml, is_long
from .rules import Rule, Unfreeze, is_empty, is_text_or_texts

RECIPES = Path(__file__).parent / "recipes"
_MERGE = "tag:yaml.org,2002:merge"


def read_data(path: str | Path) -> Any:
    """Return the plain data of a file: JSON for a path ending in ``.json``, else YAML.

    Raises:
        SpecError: if it cannot be read, is too large, or says a key twice in one mapping (both formats would keep the
            last).
    """
    path = Path(path)
    try:
        data = _read(path)
        check_data(data)
    except Exception as error:  # the constructors of YAML raise whatever comes: KeyError, IndexError, AttributeError
        raise SpecError(f"{brief(str(path))} cannot be read as a spec: {brief(str(error))}") from error
    return data


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    text = content.decode("utf-8")
    if path.suffix == ".json":
        return strict_json(text)
    check_yaml(text)
    return yaml.load(text, _FastLoader if is_long(text) else _Loader)


def strict_json(text: str) -> Any:
    """Return the plain data of a JSON text.

    Raises:
        ValueError: if it is none, or says a key twice in one mapping.
        RecursionError: if it is too deep.
    """
    return json.loads(text, object_pairs_hook=_once, parse_int=_whole)


def _whole(digits: str) -> int:
    """Return a whole number; one of thousands of digits would take long to read, and means nothing."""
    if len(digits) > 400:
        raise ValueError(f"it has a number of {len(digits):,} digits")
    return int(digits)


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs as a dict, or raise a ValueError for a key said twice."""
    pairs = list(pairs)
    found: dict[Any, Any] = dict(pairs)
    if len(found) == len(pairs):
        return found
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is said twice in one mapping")
        found[key] = value
    return found


class _Once:
    """``construct_mapping`` of a YAML loader, with ``_once``."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        loader: Any = super()
        _once((self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE)  # type: ignore[attr-defined]
        return loader.construct_mapping(node, deep)


class _Loader(_Once, yaml.SafeLoader):
    """YAML's safe loader."""


class _FastLoader(_Once, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml."""


def in_package(name: str | Path, folder: str = "") -> str | Path:
    """Return the path of a recipe, or an alias file, of the package if a text is its name; else what was given.

    Args:
        name: a text without a dot or a slash may be such a name; ``./balanced`` is a file always.
        folder: ``aliases``, or nothing for recipes.

    Raises:
        SpecError: if it is neither the name of one nor of a file; with the names there are.
    """
    if not isinstance(name, str) or set(name) & set("./\\") or not name:
        return name
    known = {path.stem: path for path in sorted((RECIPES / folder).glob("*.yaml"))}
    if name in known:
        return known[name]
    try:
        os.stat(name)
        return name
    except FileNotFoundError:
        pass
    except (OSError, ValueError):  # too long, or with a zero in it: reading it says so
        return name
    what = "alias file" if folder else "recipe"
    near = closest(name, known)
    hint = f"Closest: {near}. " if near else ""
    raise SpecError(f"{brief(name)} is no file, and no {what} of convpeft. {hint}There are: {', '.join(known)}.")


def read_spec(path: str | Path) -> dict[str, Any]:
    """Return the plain data of a spec file, or of a recipe by its name.

    Raises:
        SpecError: if it cannot be read, or is no mapping.
    """
    data = read_data(in_package(path))
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping with 'rules', not {type(data).__name__}")
    return data


def _unknown_keys(data: Mapping[str, Any], known: Sequence[str], label: str) -> list[SpecError]:
    found: list[SpecError] = []
    for key in data:
        if not isinstance(key, str):
            found.append(OptionError(f"{label}: keys are texts, not {shown(key)}"))
        elif key not in known:
            near = closest(key, known)
            hint = f"Closest: {near}. " if near else ""
            found.append(OptionError(f"unknown key {shown(key)} in {label}. {hint}Known: {', '.join(known)}."))
    return found


def _entries(data: Mapping[str, Any], key: str, problems: list[SpecError]) -> list[tuple[int, Any]]:
    entries = data.get(key)
    if entries is None or is_empty(entries):
        return []
    if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Sequence):
        problems.append(SpecError(f"{key} must be a list, not {shown(entries)}"))
        return []
    if len(entries) > MOST_RULES:
        problems.append(SpecError(f"{key} has {len(entries):,} entries, at most {MOST_RULES:,} are read"))
        return []
    return list(enumerate(entries, 1))


def _rule(entry: Any, label: str, problems: list[SpecError]) -> Rule | None:
    if isinstance(entry, Rule):
        return entry
    if not isinstance(entry, Mapping) or not {"match", "kind"} <= set(entry):
        problems.append(SpecError(f"{label} must be a mapping with 'match' and 'kind', not {shown(entry)}"))
        return None
    if (
        not is_text_or_texts(entry["match"])
        or not isinstance(entry["kind"], str)
        or not is_text_or_texts(entry.get("only", ()))
    ):
        problems.append(OptionError(f"{label}: match and only are texts or lists of texts, kind is a text"))
        return None
    where = entry.get("where")
    if where is not None and not is_empty(where) and not isinstance(where, Mapping):
        problems.append(OptionError(f"{label}: where must be a mapping, not {shown(where)}"))
        return None
    if "self" in entry:
        problems.append(OptionError(f"{label}: unknown key 'self'"))
        return None
    wrong = [key for key in entry if not isinstance(key, str)]
    if wrong:
        problems.append(OptionError(f"{label}: keys are texts, not {shown(wrong[0])}"))
        return None
    return Rule(**entry)


def _unfreeze(entry: Any, label: str, problems: list[SpecError]) -> Unfreeze | None:
    if isinstance(entry, (str, Unfreeze)):
        return entry if isinstance(entry, Unfreeze) else Unfreeze(entry)
    if not isinstance(entry, Mapping) or not is_text_or_texts(entry.get("match")):
        problems.append(SpecError(f"{label} must be a pattern or a mapping with 'match', not {shown(entry)}"))
        return None
    problems += _unknown_keys(entry, ("match", "lr_mult"), label)
    return Unfreeze(entry["match"], entry.get("lr_mult", 1.0))
