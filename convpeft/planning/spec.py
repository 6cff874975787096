"""What a user writes: rules, what to unfreeze, and named positions. YAML, JSON, dicts or dataclasses, all the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..adapters.options import fits, plain
from ..errors import OptionError, SpecError, brief, closest, raise_problems, shown
from .bounds import MOST_LETTERS, MOST_PATTERNS, MOST_RULES, check_data
from .braces import measure
from .globs import LONGEST
from .parsing import _entries, _rule, _unfreeze, _unknown_keys, in_package, read_data, read_spec
from .rules import Rule, Unfreeze, as_patterns, check_alias, check_patterns, is_empty

VERSION = 1

NORMS = ("frozen", "affine", "adapt")

_SPEC_KEYS = ("version", "aliases", "rules", "unfreeze", "norm", "hold")


@dataclass(frozen=True)
class SpecCheck:
    """What is wrong with a spec.

    Attributes:
        problems: everything that can be told without a model.
        unresolved: labels of rules and entries whose patterns are no sound globs, or name an alias that there is not.
        unsound: labels of rules and entries with any problem of their own.
    """

    problems: tuple[SpecError, ...]
    unresolved: frozenset[str]
    unsound: frozenset[str]


@dataclass
class Spec:
    """All rules for one adapter.

    Attributes:
        rules: the first that matches a module wins.
        unfreeze: what trains along; plain patterns are taken as entries.
        norm: of every BatchNorm-like layer. ``frozen`` holds it in eval mode, as the base has it; with ``affine`` its
            scale and shift train and its statistics are held, both as the adapter's own (``calibrate`` re-estimates the
            statistics); with ``adapt`` the statistics follow the batches as well.
        aliases: named positions: name to patterns, used as ``@name``.
        hold: the last share of the steps in which ``norm: adapt`` holds its statistics; ``set_progress`` says when.

    Example:
        >>> Spec(rules=[Rule("**", "lora", rank=4)]).to_dict()
        {'version': 1, 'rules': [{'match': '**', 'kind': 'lora', 'rank': 4}]}
    """

    rules: Sequence[Rule] = ()
    unfreeze: Sequence[Unfreeze | str] = ()
    norm: str = "frozen"
    aliases: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    hold: float = 0.0

    def __post_init__(self) -> None:
        self.rules = _listed(self.rules, "rules")
        for number, rule in enumerate(self.rules, 1):
            if not isinstance(rule, Rule):
                raise SpecError(f"rule {number} must be a Rule, not {shown(rule)}; Spec.from_dict reads plain data")
        entries = (self.unfreeze,) if isinstance(self.unfreeze, (str, Unfreeze)) else self.unfreeze
        entries = _listed(entries, "unfreeze")
        self.unfreeze = tuple(entry if isinstance(entry, Unfreeze) else Unfreeze(entry) for entry in entries)
        if not isinstance(self.aliases, Mapping):
            raise SpecError(f"aliases must map names to patterns, not {shown(self.aliases)}")
        self.aliases = {name: as_patterns(value) for name, value in self.aliases.items()}
        self.hold = plain(self.hold)

    @classmethod
    def load(cls, path: str | Path, *, aliases: str | Path | Mapping[str, Any] | None = None) -> Spec:
        """Return the spec of a YAML or JSON file, or of a recipe that comes with the package.

        Args:
            path: ends in ``.json`` for JSON; anything else is read as YAML. Or ``light``, ``balanced`` or ``strong``, recipes
                that train at most 0.5, 2.5 and 8 % of a detector and merge whole; they need ``aliases``.
            aliases: a file (or mapping) of named positions; it wins over the spec's own. Or the name of an alias file that
                comes with the package, such as ``yolov8-world``; a name that there is not is an error that lists them.

        Raises:
            SpecError: if the file is unreadable or says something unknown; all problems at once.

        Example:
            >>> spec = Spec.load("balanced", aliases="yolov8-world")
            >>> spec.norm, [rule.kind for rule in spec.rules]
            ('adapt', ['rep_mona', 'lora', 'lora', 'lora'])
        """
        data = read_spec(path)
        if aliases is not None:
            named = dict(aliases) if isinstance(aliases, Mapping) else read_data(in_package(aliases, "aliases"))
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
        raise_problems([*problems, *spec.check(complete=not problems).problems], source)
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
        check_data(data)
        problems = _unknown_keys(data, _SPEC_KEYS, "the spec")
        version = data.get("version", VERSION)
        if not isinstance(version, (int, float)) or version != VERSION:
            problems.append(SpecError(f"version {shown(version)} is not known; this convpeft reads version {VERSION}"))
        rules = [_rule(entry, f"rule {number}", problems) for number, entry in _entries(data, "rules", problems)]
        unfreeze = [
            _unfreeze(entry, f"unfreeze {number}", problems) for number, entry in _entries(data, "unfreeze", problems)
        ]
        aliases = data.get("aliases")
        if aliases is None or is_empty(aliases):
            aliases = {}
        elif not isinstance(aliases, Mapping):
            problems.append(SpecError(f"aliases must map names to patterns, not {shown(aliases)}"))
            aliases = {}
        spec = cls(
            [rule for rule in rules if rule],
            [entry for entry in unfreeze if entry],
            data.get("norm", "frozen"),
            aliases,
            data.get("hold", 0.0),
        )
        return spec, problems

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain data that ``from_dict`` reads back to an equal spec."""
        result: dict[str, Any] = {"version": VERSION}
        if self.aliases:
            result["aliases"] = {name: list(patterns) for name, patterns in self.aliases.items()}
        result["rules"] = [rule.to_dict() for rule in self.rules]
        if self.unfreeze:
            result["unfreeze"] = [entry.to_dict() for entry in self.entries]
        if self.norm != "frozen":
            result["norm"] = self.norm
        if self.hold != 0:
            result["hold"] = self.hold
        return result

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON (a path ending in ``.json``) or YAML."""
        path, data = Path(path), self.to_dict()
        text = json.dumps(data, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")

    @property
    def entries(self) -> tuple[Unfreeze, ...]:
        """What trains along, as entries."""
        return tuple(entry for entry in self.unfreeze if isinstance(entry, Unfreeze))

    def problems(self) -> list[SpecError]:
        """Return everything wrong with the spec that can be told without a model."""
        return list(self.check().problems)

    def check(self, *, complete: bool = True) -> SpecCheck:
        """Return what is wrong with the spec, and with which of its rules and entries.

        Args:
            complete: an empty spec is a problem, too.
        """
        labelled: list[tuple[str, Rule | Unfreeze]] = [(f"rule {n}", rule) for n, rule in enumerate(self.rules, 1)]
        labelled += [(f"unfreeze {n}", entry) for n, entry in enumerate(self.entries, 1)]
        crowded = self._crowded([entry for _, entry in labelled])
        if crowded is not None:
            everything = frozenset(label for label, _ in labelled)
            return SpecCheck((SpecError(crowded),), everything, everything)
        aliases = [problem for name, patterns in self.aliases.items() for problem in check_alias(name, patterns)]
        found: list[SpecError] = []
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            found.append(OptionError(f"norm must be one of {', '.join(NORMS)}, not {shown(self.norm)}"))
        found += self._hold_problems()
        if complete and not self.rules and not self.unfreeze and self.norm == "frozen":
            found.append(SpecError("the spec has no rules and unfreezes nothing: nothing would train"))
        found += aliases
        unresolved, unsound = set(), set()
        for label, entry in labelled:
            patterns = check_patterns(entry.match, label) + self._alias_problems(entry.match, label)
            others = entry.problems(label)
            if patterns or aliases:
                unresolved.add(label)
            if patterns or others:
                unsound.add(label)
            found += patterns + others
        return SpecCheck(tuple(found), frozenset(unresolved), frozenset(unsound))

    def _hold_problems(self) -> list[SpecError]:
        if not fits(self.hold, float) or not 0 <= self.hold <= 1:
            return [OptionError(f"hold must be a share of the steps, from 0 to 1, not {shown(self.hold)}")]
        if self.hold and self.norm != "adapt":
            return [
                OptionError(f"hold is for norm: adapt; with norm: {shown(self.norm)} statistics are held throughout")
            ]
        return []

    def _crowded(self, entries: Sequence[Rule | Unfreeze]) -> str | None:
        """Return why there is more in the spec than can be matched in a reasonable time, or None."""
        if len(entries) > MOST_RULES:
            return f"{len(entries):,} rules and unfreeze entries are too many, at most {MOST_RULES:,}; let patterns match more"
        patterns = letters = 0
        for entry in [*self.aliases.values(), *(entry.match for entry in entries)]:
            for pattern in entry:
                bare = pattern.removeprefix("!") if isinstance(pattern, str) else ""
                patterns += max(1, len(self.aliases.get(bare[1:], ()))) if bare.startswith("@") else 1
                letters += _size(pattern)
        if patterns > MOST_PATTERNS:
            return f"it has {patterns:,} patterns with the aliases written out, at most {MOST_PATTERNS:,} are read"
        if letters > MOST_LETTERS:
            return f"its patterns are too long with the braces written out: more than {MOST_LETTERS:,} letters"
        return None

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

    def _alias_problems(self, patterns: Iterable[Any], label: str) -> list[SpecError]:
        found: list[SpecError] = []
        bare = [pattern.removeprefix("!") for pattern in patterns if isinstance(pattern, str)]
        for name in (pattern[1:] for pattern in bare if pattern.startswith("@")):
            if name not in self.aliases:
                near = closest(name, self.aliases)
                hint = f"Closest: @{near}." if near else "Give aliases in the spec, or Spec.load(path, aliases=...)."
                found.append(SpecError(f"{label}: no alias is named '@{brief(name)}'. {hint}"))
        return found


def _listed(values: Any, name: str) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise SpecError(f"{name} must be a list, not {shown(values)}")
    return tuple(values)


def _size(pattern: Any) -> int:
    """Return how many letters a pattern has with its braces written out; one that is none counts as none."""
    if not isinstance(pattern, str) or len(pattern) > LONGEST:
        return 0
    try:
        return min(measure(pattern)[1], MOST_LETTERS + 1)
    except SpecError:
        return 0


SpecLike = Spec | Mapping[str, Any] | str | Path


def as_spec(spec: SpecLike) -> Spec:
    """Return a ``Spec`` from a spec, plain data, or the path of a spec file; planning checks its rules."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Mapping):
        return Spec.draft(spec)
    if isinstance(spec, (str, Path)):
        return Spec.draft(read_spec(spec))
    raise SpecError(f"a spec is a Spec, a mapping or a path, not {type(spec).__name__}")
