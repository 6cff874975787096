"""What a user writes: rules, what to unfreeze, and named positions. YAML, JSON, dicts or dataclasses, all the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import OptionError, SpecError, closest, raise_problems
from .reading import read_data
from .rules import Rule, Unfreeze, as_patterns, check_alias, check_patterns, is_text_or_texts

VERSION = 1
NORMS = ("frozen", "adapt")
_SPEC_KEYS = ("version", "aliases", "rules", "unfreeze", "norm")


@dataclass
class Spec:
    """All rules for one adapter.

    Attributes:
        rules: the first that matches a module wins.
        unfreeze: what trains along; plain patterns are taken as entries.
        norm: ``frozen`` holds every BatchNorm-like layer in eval mode; ``adapt`` lets all of them train, statistics
            and affine, as part of the adapter.
        aliases: named positions: name to patterns, used as ``@name``.

    Example:
        >>> Spec(rules=[Rule("**", "lora", rank=4)]).to_dict()
        {'version': 1, 'rules': [{'match': '**', 'kind': 'lora', 'rank': 4}]}
    """

    rules: Sequence[Rule] = ()
    unfreeze: Sequence[Unfreeze | str] = ()
    norm: str = "frozen"
    aliases: Mapping[str, str | Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = tuple(self.rules)
        entries = (self.unfreeze,) if isinstance(self.unfreeze, (str, Unfreeze)) else self.unfreeze
        self.unfreeze = tuple(entry if isinstance(entry, Unfreeze) else Unfreeze(entry) for entry in entries)
        self.aliases = {name: as_patterns(value) for name, value in self.aliases.items()}

    @classmethod
    def load(cls, path: str | Path, *, aliases: str | Path | Mapping[str, Any] | None = None) -> Spec:
        """Return the spec of a YAML or JSON file.

        Args:
            path: ends in ``.json`` for JSON; anything else is read as YAML.
            aliases: a file (or mapping) of named positions; it wins over the spec's own.

        Raises:
            SpecError: if the file is unreadable or says something unknown; all problems at once.
        """
        data = read_spec(path)
        if aliases is not None:
            named = dict(aliases) if isinstance(aliases, Mapping) else read_data(aliases)
            named = named.get("aliases", named) if isinstance(named, dict) else named
            if not isinstance(named, dict):
                raise SpecError(f"{aliases}: an alias file maps names to patterns")
            own = data.get("aliases") or {}
            if isinstance(own, dict):
                data = {**data, "aliases": {**own, **{key: v for key, v in named.items() if key != "version"}}}
        return cls.from_dict(data, source=str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "spec") -> Spec:
        """Return the spec that plain data describes.

        Raises:
            SpecError: all problems at once: unknown keys with the nearest name, values of the wrong type.
        """
        spec, problems = cls._draft(data, source)
        raise_problems(problems + spec._problems(complete=not problems), source)
        return spec

    @classmethod
    def draft(cls, data: Mapping[str, Any]) -> Spec:
        """Return the spec that plain data describes, its rules unchecked: ``problems`` tells what is wrong with them.

        Raises:
            SpecError: as ``from_dict`` does, if the data are not built like a spec.
        """
        spec, problems = cls._draft(data, "spec")
        return cls.from_dict(data) if problems else spec

    @classmethod
    def _draft(cls, data: Mapping[str, Any], source: str) -> tuple[Spec, list[SpecError]]:
        if not isinstance(data, Mapping):
            raise SpecError(f"{source}: a spec is a mapping with 'rules', not {type(data).__name__}")
        problems = _unknown_keys(data, _SPEC_KEYS, "the spec")
        version = data.get("version", VERSION)
        if version != VERSION:
            problems.append(SpecError(f"version {version!r} is not known; this convpeft reads version {VERSION}"))
        rules = [_rule(entry, f"rule {number}", problems) for number, entry in _entries(data, "rules", problems)]
        unfreeze = [
            _unfreeze(entry, f"unfreeze {number}", problems) for number, entry in _entries(data, "unfreeze", problems)
        ]
        aliases = data.get("aliases") or {}
        if not isinstance(aliases, Mapping):
            problems.append(SpecError("aliases must map names to patterns"))
            aliases = {}
        spec = cls(
            [rule for rule in rules if rule],
            [entry for entry in unfreeze if entry],
            data.get("norm", "frozen"),
            aliases,
        )
        return spec, problems

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain data that ``from_dict`` reads back to an equal spec."""
        result: dict[str, Any] = {"version": VERSION}
        if self.aliases:
            result["aliases"] = {name: list(patterns) for name, patterns in self.aliases.items()}
        result["rules"] = [rule.to_dict() for rule in self.rules]
        if self.unfreeze:
            result["unfreeze"] = [entry.to_dict() for entry in self.unfreeze if isinstance(entry, Unfreeze)]
        if self.norm != "frozen":
            result["norm"] = self.norm
        return result

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON (a path ending in ``.json``) or YAML."""
        path, data = Path(path), self.to_dict()
        text = json.dumps(data, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")

    def problems(self) -> list[SpecError]:
        """Return everything wrong with the spec that can be told without a model."""
        return self._problems(complete=True)

    def _problems(self, complete: bool) -> list[SpecError]:
        found: list[SpecError] = []
        if self.norm not in NORMS:
            found.append(OptionError(f"norm must be one of {', '.join(NORMS)}, not {self.norm!r}"))
        if complete and not self.rules and not self.unfreeze and self.norm != "adapt":
            found.append(SpecError("the spec has no rules and unfreezes nothing: nothing would train"))
        for name, patterns in self.aliases.items():
            found += check_alias(name, patterns)
        for number, rule in enumerate(self.rules, 1):
            found += rule.problems(f"rule {number}") + self._alias_problems(rule.match, f"rule {number}")
        for number, entry in enumerate(self.unfreeze, 1):
            assert isinstance(entry, Unfreeze)
            label = f"unfreeze {number}"
            found += entry.problems(label) + self._alias_problems(entry.match, label)
        return found

    def can_resolve(self, patterns: Iterable[Any]) -> bool:
        """Return whether ``resolve`` knows every alias among the patterns, and each of them is a sound glob."""
        patterns = tuple(patterns)
        if check_patterns(patterns, "") or self._alias_problems(patterns, ""):
            return False
        return not any(check_alias(name, self.aliases[name]) for name in self.aliases)

    def resolve(self, patterns: Iterable[str]) -> list[tuple[str, str]]:
        """Return ``(as written, pattern)`` pairs with aliases replaced; an excluded alias excludes all it names."""
        resolved: list[tuple[str, str]] = []
        for written in patterns:
            excluded, bare = ("!", written[1:]) if written.startswith("!") else ("", written)
            if not bare.startswith("@"):
                resolved.append((written, written))
                continue
            resolved += [(f"{written} = {pattern}", excluded + pattern) for pattern in self.aliases[bare[1:]]]
        return resolved

    def _alias_problems(self, patterns: Iterable[str], label: str) -> list[SpecError]:
        found: list[SpecError] = []
        bare = [str(pattern).removeprefix("!") for pattern in patterns]
        for name in (pattern[1:] for pattern in bare if pattern.startswith("@")):
            if name not in self.aliases:
                near = closest(name, self.aliases)
                hint = f"Closest: @{near}." if near else "Give aliases in the spec, or Spec.load(path, aliases=...)."
                found.append(SpecError(f"{label}: no alias is named '@{name}'. {hint}"))
        return found


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
