"""Read YAML and JSON, strict about keys said twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import OptionError, SpecError, closest
from .rules import Rule, Unfreeze, is_text_or_texts

_MERGE = "tag:yaml.org,2002:merge"


def read_data(path: str | Path) -> Any:
    """Return the plain data of a file: JSON for a path ending in ``.json``, else YAML.

    Raises:
        SpecError: if it cannot be read, or says a key twice in one mapping (both formats would keep the last).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise SpecError(f"{path} cannot be read as a spec: {error}") from error


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs as a dict, or raise a ValueError for a key said twice."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is said twice in one mapping")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with ``_once``."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once((self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE)
        return super().construct_mapping(node, deep)


def read_spec(path: str | Path) -> dict[str, Any]:
    """Return the plain data of a spec file.

    Raises:
        SpecError: if it cannot be read, or is no mapping.
    """
    data = read_data(path)
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping with 'rules', not {type(data).__name__}")
    return data


def _unknown_keys(data: Mapping[str, Any], known: Sequence[str], label: str) -> list[SpecError]:
    found: list[SpecError] = []
    for key in data:
        if key not in known:
            near = closest(str(key), known)
            found.append(
                OptionError(
                    f"unknown key {key!r} in {label}. {f'Closest: {near}. ' if near else ''}Known: {', '.join(known)}."
                )
            )
    return found


def _entries(data: Mapping[str, Any], key: str, problems: list[SpecError]) -> list[tuple[int, Any]]:
    entries = data.get(key) or []
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        problems.append(SpecError(f"{key} must be a list"))
        return []
    return list(enumerate(entries, 1))


def _rule(entry: Any, label: str, problems: list[SpecError]) -> Rule | None:
    if isinstance(entry, Rule):
        return entry
    if not isinstance(entry, Mapping) or not {"match", "kind"} <= set(entry):
        problems.append(SpecError(f"{label} must be a mapping with 'match' and 'kind', not {entry!r}"))
        return None
    if (
        not is_text_or_texts(entry["match"])
        or not isinstance(entry["kind"], str)
        or not is_text_or_texts(entry.get("only", ()))
    ):
        problems.append(OptionError(f"{label}: match and only are texts or lists of texts, kind is a text"))
        return None
    if not isinstance(entry.get("where") or {}, Mapping):
        problems.append(OptionError(f"{label}: where must be a mapping, not {entry['where']!r}"))
        return None
    if "self" in entry:
        problems.append(OptionError(f"{label}: unknown key 'self'"))
        return None
    return Rule(**{str(key): value for key, value in entry.items()})


def _unfreeze(entry: Any, label: str, problems: list[SpecError]) -> Unfreeze | None:
    if isinstance(entry, (str, Unfreeze)):
        return entry if isinstance(entry, Unfreeze) else Unfreeze(entry)
    if not isinstance(entry, Mapping) or not is_text_or_texts(entry.get("match")):
        problems.append(SpecError(f"{label} must be a pattern or a mapping with 'match', not {entry!r}"))
        return None
    problems += _unknown_keys(entry, ("match", "lr_mult"), label)
    return Unfreeze(entry["match"], entry.get("lr_mult", 1.0))
