"""What a user writes: rules that choose modules by name and give them adapters. YAML, JSON, dicts or dataclasses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .adapters.base import read_options
from .errors import OptionError, PatternError, SpecError, closest, raise_problems
from .matching import compile_glob
from .reading import read_data
from .registry import LEAVE, adapter_class

VERSION = 1
NORMS = ("frozen", "adapt")
WHERE = {
    "min_channels": "a whole number",
    "max_channels": "a whole number",
    "kernel_size": "a whole number or two",
    "groups": "a whole number",
    "depthwise": "true or false",
}
_RULE_KEYS = ("match", "kind", "place", "only", "where", "lr_mult", "channels", "output")
_SPEC_KEYS = ("version", "aliases", "rules", "unfreeze", "norm")


def _patterns(match: str | Iterable[str]) -> tuple[str, ...]:
    return tuple(match) if isinstance(match, Iterable) and not isinstance(match, str) else (match,)


class Rule:
    """One line of a spec: the modules that match get adapters of a kind. The first rule that matches a module wins.

    Args:
        match: a glob over dotted module names, or a list of them; ``!`` excludes, ``@name`` is an alias.
        kind: a registered adapter kind, or ``"leave"`` (match, and give nothing).
        place: ``"parallel"`` or ``"output"``; unset, the kind's own: beside Conv2d and Linear layers where it can,
            on the output of blocks that are named exactly.
        only: class names; only modules of these classes (or their subclasses) match.
        where: further conditions: ``min_channels``, ``max_channels`` (of both sides), ``kernel_size``, ``groups``,
            ``depthwise``.
        lr_mult: learning rate of these adapters, relative to the rate given to ``param_groups``.
        channels: of the module's output, for output adapters whose channels cannot be found out.
        output: which entry of a tuple, list or dict output is adapted.
        options: the kind's own options (``rank=8``).

    Example:
        >>> Rule("neck.**.conv", "rep_mona", rank=16)
        Rule('neck.**.conv', 'rep_mona', rank=16)
    """

    def __init__(
        self,
        match: str | Iterable[str],
        kind: str,
        *,
        place: str | None = None,
        only: str | Iterable[str] = (),
        where: Mapping[str, Any] | None = None,
        lr_mult: float = 1.0,
        channels: int | None = None,
        output: int | str | None = None,
        **options: Any,
    ) -> None:
        self.match = _patterns(match)
        self.kind = kind
        self.place = place
        self.only = _patterns(only)
        self.where = dict(where or {})
        self.lr_mult = lr_mult
        self.channels = channels
        self.output = output
        self.options = options

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as plain data, defaults left out."""
        result: dict[str, Any] = {"match": _short(self.match), "kind": self.kind}
        defaults: dict[str, Any] = {
            "place": None,
            "only": (),
            "where": {},
            "lr_mult": 1.0,
            "channels": None,
            "output": None,
        }
        for key, default in defaults.items():
            value = getattr(self, key)
            if value != default:
                result[key] = _short(value) if isinstance(value, tuple) else value
        if self.where:
            result["where"] = _plain(self.where)
        return {**result, **_plain(self.options)}

    def problems(self, label: str) -> list[SpecError]:
        """Return everything wrong with the rule that can be told without a model."""
        found: list[SpecError] = []
        found += _check_patterns(self.match, label)
        found += _check_lr_mult(self.lr_mult, label)
        if self.place not in (None, "parallel", "output"):
            found.append(OptionError(f"{label}: place must be 'parallel' or 'output', not {self.place!r}"))
        if self.channels is not None and not (_is_whole(self.channels) and self.channels > 0):
            found.append(OptionError(f"{label}: channels must be a whole number above 0, not {self.channels!r}"))
        if self.output is not None and not (_is_whole(self.output) or isinstance(self.output, str)):
            found.append(OptionError(f"{label}: output must be an index or a key, not {self.output!r}"))
        return found + _check_where(self.where, label) + self._kind_problems(label)

    def _kind_problems(self, label: str) -> list[SpecError]:
        if self.kind == LEAVE:
            return [
                OptionError(f"{label}: kind 'leave' takes no option {key!r}.{_nearest_rule_key(key)}")
                for key in self.options
            ]
        try:
            adapter = adapter_class(self.kind)
        except SpecError as error:
            return [type(error)(f"{label}: {error}")]
        found: list[SpecError] = []
        if self.place in ("parallel", "output") and self.place not in adapter.places:
            found.append(
                OptionError(
                    f"{label}: kind {self.kind!r} has no place {self.place!r}, only {', '.join(adapter.places)}"
                )
            )
        for problem in read_options(adapter, self.options)[1]:
            unknown = [key for key in self.options if f"unknown key {key!r}" in str(problem)]
            found.append(OptionError(f"{label}: {problem}{_nearest_rule_key(unknown[0]) if unknown else ''}"))
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        rest = {key: value for key, value in self.to_dict().items() if key not in ("match", "kind")}
        options = "".join(f", {key}={value!r}" for key, value in rest.items())
        return f"Rule({_short(self.match)!r}, {self.kind!r}{options})"


@dataclass(frozen=True)
class Unfreeze:
    """Modules (with all below them) that train along; what they become belongs to the adapter.

    Attributes:
        match: globs as in a ``Rule``.
        lr_mult: learning rate relative to the rate given to ``param_groups``.
    """

    match: tuple[str, ...]
    lr_mult: float = 1.0

    def __init__(self, match: str | Iterable[str], lr_mult: float = 1.0) -> None:
        object.__setattr__(self, "match", _patterns(match))
        object.__setattr__(self, "lr_mult", lr_mult)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return {"match": _short(self.match)} | ({} if self.lr_mult == 1.0 else {"lr_mult": self.lr_mult})

    def problems(self, label: str) -> list[SpecError]:
        """Return everything wrong with the entry that can be told without a model."""
        return _check_patterns(self.match, label) + _check_lr_mult(self.lr_mult, label)


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
        self.aliases = {name: _patterns(value) for name, value in self.aliases.items()}

    @classmethod
    def load(cls, path: str | Path, *, aliases: str | Path | Mapping[str, Any] | None = None) -> Spec:
        """Return the spec of a YAML or JSON file.

        Args:
            path: ends in ``.json`` for JSON; anything else is read as YAML.
            aliases: a file (or mapping) of named positions; it wins over the spec's own.

        Raises:
            SpecError: if the file is unreadable or says something unknown; all problems at once.
        """
        data = read_data(path)
        if not isinstance(data, dict):
            raise SpecError(f"{path}: a spec is a mapping with 'rules', not {type(data).__name__}")
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
        raise_problems(problems + spec._problems(complete=not problems), source)
        return spec

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
            found += _check_alias(name, patterns)
        for number, rule in enumerate(self.rules, 1):
            found += rule.problems(f"rule {number}") + self._alias_problems(rule.match, f"rule {number}")
        for number, entry in enumerate(self.unfreeze, 1):
            assert isinstance(entry, Unfreeze)
            label = f"unfreeze {number}"
            found += entry.problems(label) + self._alias_problems(entry.match, label)
        return found

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


def _short(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _nearest_rule_key(unknown: str) -> str:
    near = closest(unknown, _RULE_KEYS, 1)
    return f" Or the rule's own key {near!r}?" if near else ""


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
        not _is_text_or_texts(entry["match"])
        or not isinstance(entry["kind"], str)
        or not _is_text_or_texts(entry.get("only", ()))
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
    if not isinstance(entry, Mapping) or not _is_text_or_texts(entry.get("match")):
        problems.append(SpecError(f"{label} must be a pattern or a mapping with 'match', not {entry!r}"))
        return None
    problems += _unknown_keys(entry, ("match", "lr_mult"), label)
    return Unfreeze(entry["match"], entry.get("lr_mult", 1.0))


def _is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value))


def _check_patterns(patterns: Sequence[str], label: str) -> list[SpecError]:
    found: list[SpecError] = []
    positive = [pattern for pattern in patterns if not str(pattern).startswith("!")]
    if not positive:
        found.append(SpecError(f"{label} needs at least one pattern that is not an exclusion"))
    for pattern in patterns:
        if not isinstance(pattern, str):
            found.append(OptionError(f"{label}: a pattern is a text, not {pattern!r}"))
            continue
        try:
            if not pattern.removeprefix("!").startswith("@"):
                compile_glob(pattern.removeprefix("!"))
        except SpecError as error:
            found.append(type(error)(f"{label}: {error}"))
    return found


def _check_alias(name: str, patterns: Iterable[Any]) -> list[SpecError]:
    found: list[SpecError] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            found.append(OptionError(f"alias '@{name}' must be a pattern or a list of patterns, not {pattern!r}"))
            continue
        if pattern.removeprefix("!").startswith("@"):
            found.append(PatternError(f"alias '@{name}': {pattern!r} is another alias; write its patterns out"))
            continue
        try:
            compile_glob(pattern.removeprefix("!"))
        except SpecError as error:
            found.append(type(error)(f"alias '@{name}': {error}"))
    return found


def _check_where(where: Mapping[str, Any], label: str) -> list[SpecError]:
    found: list[SpecError] = []
    for key, value in where.items():
        if key not in WHERE:
            near = closest(str(key), WHERE)
            hint = f"Closest: {near}. " if near else ""
            found.append(OptionError(f"{label}: unknown key {key!r} in where. {hint}Known: {', '.join(WHERE)}."))
            continue
        pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_whole, value))
        number = _is_whole(value) or (key == "kernel_size" and pair)
        fits = isinstance(value, bool) if key == "depthwise" else number
        if not fits:
            found.append(OptionError(f"{label}: {key} in where must be {WHERE[key]}, not {value!r}"))
    return found


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_lr_mult(lr_mult: Any, label: str) -> list[SpecError]:
    number = isinstance(lr_mult, (int, float)) and not isinstance(lr_mult, bool)
    if number and 0 <= lr_mult < float("inf"):
        return []
    return [OptionError(f"{label}: lr_mult must be a number of at least 0, not {lr_mult!r}")]
