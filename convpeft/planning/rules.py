"""The lines of a spec: rules that give modules adapters, and entries that unfreeze modules; each checks itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.options import fits, plain, read_options
from ..adapters.registry import LEAVE, adapter_class
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry
from ..errors import OptionError, PatternError, SpecError, brief, closest, shown
from ..hosts.slots import base_class
from .globs import compile_glob

WHERE = {
    "min_channels": "a whole number",
    "max_channels": "a whole number",
    "kernel_size": "a whole number or two",
    "groups": "a whole number",
    "depthwise": "true or false",
}
_MOST = 2**20  # channels, and the index of an output
RULE_KEYS = ("match", "kind", "place", "only", "where", "lr_mult", "up_mult", "channels", "output")


def as_patterns(match: str | Iterable[str]) -> tuple[str, ...]:
    """Return one pattern, or several, as a tuple."""
    several = isinstance(match, Iterable) and not isinstance(match, (str, bytes, Mapping))
    return tuple(match) if several else (match,)  # type: ignore[return-value]  # what is no text is a problem later


class Rule:
    """One line of a spec: the modules that match get adapters of a kind. The first rule that matches a module wins.

    Args:
        match: a glob over dotted module names, or a list of them; ``!`` excludes, ``@name`` is an alias.
        kind: a registered adapter kind, or ``"leave"`` (match, and give nothing).
        place: ``"parallel"`` or ``"output"``; unset, the kind's own: beside the layers it serves where it can,
            on the output of blocks that are named exactly.
        only: class names; only modules of these classes (or their subclasses) match.
        where: further conditions: ``min_channels``, ``max_channels`` (of both sides), ``kernel_size``, ``groups``,
            ``depthwise``.
        lr_mult: learning rate of these adapters, relative to the rate given to ``param_groups``.
        up_mult: learning rate of their last weights (B of LoRA, which starts at zero), relative to that of their others;
            unset, as ``param_groups`` says.
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
        up_mult: float | None = None,
        channels: int | None = None,
        output: int | str | None = None,
        **options: Any,
    ) -> None:
        self.match = as_patterns(match)
        self.kind = kind
        self.place = place
        self.only = as_patterns(only)
        self.where: Any = plain(dict(where)) if isinstance(where, Mapping) else where
        if where is None or is_empty(where):
            self.where = {}
        self.lr_mult = plain(lr_mult)
        self.up_mult = plain(up_mult)
        self.channels = plain(channels)
        self.output = plain(output)
        self.options = plain(options)

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as plain data, defaults left out."""
        result: dict[str, Any] = {"match": shortest(self.match), "kind": self.kind}
        defaults: dict[str, Any] = {"place": None, "only": (), "lr_mult": 1.0, "channels": None, "output": None}
        defaults["up_mult"] = None
        for key, default in defaults.items():
            value = getattr(self, key)
            if value != default:
                result[key] = shortest(value) if isinstance(value, tuple) else value
        if self.where or not isinstance(self.where, dict):
            result["where"] = _plain(self.where) if isinstance(self.where, dict) else self.where
        return {**result, **_plain(self.options)}

    def passes(self, module: nn.Module) -> bool:
        """Return whether a module that matches meets ``only`` and ``where`` as well."""
        classes = {base.__name__ for base in base_class(module).__mro__}
        if self.only and not classes & set(self.only):
            return False
        if not self.where:
            return True
        if not isinstance(module, PLAIN_HOSTS):
            return False
        geometry = ConvGeometry.of(module)
        sides = (geometry.in_channels, geometry.out_channels)
        tests = {
            "min_channels": lambda least: min(sides) >= least,
            "max_channels": lambda most: max(sides) <= most,
            "kernel_size": lambda size: geometry.kernel_size == ((size,) * 2 if isinstance(size, int) else tuple(size)),
            "groups": lambda groups: geometry.groups == groups,
            "depthwise": lambda wanted: (geometry.groups > 1 and geometry.in_per_group == 1) == wanted,
        }
        return all(tests[key](value) for key, value in self.where.items())

    def conditions(self) -> str:
        """Return ``only`` and ``where`` in words."""
        parts = [f"only: {', '.join(self.only)}"] if self.only else []
        return brief("; ".join(parts + [f"{key}: {shown(value)}" for key, value in self.where.items()]))

    def problems(self, label: str) -> list[SpecError]:
        """Return everything wrong with the rule, but for its patterns, that can be told without a model."""
        found = _check_lr_mult(self.lr_mult, label)
        if self.up_mult is not None:
            found += _check_lr_mult(self.up_mult, label, "up_mult")
        if self.place is not None and not (isinstance(self.place, str) and self.place in ("parallel", "output")):
            found.append(OptionError(f"{label}: place must be 'parallel' or 'output', not {shown(self.place)}"))
        if not all(isinstance(each, str) for each in self.only):
            found.append(OptionError(f"{label}: only is a class name or a list of them, not {shown(self.only)}"))
        if self.channels is not None and not (is_whole(self.channels) and 0 < self.channels <= _MOST):
            least = (
                "a whole number above 0" if not is_whole(self.channels) or self.channels < 1 else f"at most {_MOST:,}"
            )
            found.append(OptionError(f"{label}: channels must be {least}, not {shown(self.channels)}"))
        if self.output is not None and not is_output(self.output):
            found.append(OptionError(f"{label}: output must be an index or a key, not {shown(self.output)}"))
        return found + _check_where(self.where, label) + self._kind_problems(label)

    def _kind_problems(self, label: str) -> list[SpecError]:
        if self.kind == LEAVE:
            wrong = [
                f"{label}: kind 'leave' takes no option {shown(key)}.{_nearest_rule_key(key)}" for key in self.options
            ]
            return [OptionError(problem) for problem in wrong]
        try:
            adapter = adapter_class(self.kind)
        except SpecError as error:
            return [type(error)(f"{label}: {error}")]
        found: list[SpecError] = []
        if isinstance(self.place, str) and self.place in ("parallel", "output") and self.place not in adapter.places:
            places = ", ".join(adapter.places)
            found.append(OptionError(f"{label}: kind {self.kind!r} has no place {self.place!r}, only {places}"))
        for problem in read_options(self.kind, adapter.Options, self.options)[1]:
            unknown = [key for key in self.options if f"unknown key {shown(key)} " in str(problem)]
            found.append(OptionError(f"{label}: {problem}{_nearest_rule_key(unknown[0]) if unknown else ''}"))
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        rest = {key: value for key, value in self.to_dict().items() if key not in ("match", "kind")}
        options = "".join(f", {key}={value!r}" for key, value in rest.items())
        return f"Rule({shortest(self.match)!r}, {self.kind!r}{options})"


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
        object.__setattr__(self, "match", as_patterns(match))
        object.__setattr__(self, "lr_mult", plain(lr_mult))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        return {"match": shortest(self.match)} | ({} if self.lr_mult == 1.0 else {"lr_mult": self.lr_mult})

    def problems(self, label: str) -> list[SpecError]:
        """Return everything wrong with the entry, but for its patterns, that can be told without a model."""
        return _check_lr_mult(self.lr_mult, label)


def shortest(values: tuple[Any, ...]) -> Any:
    """Return a tuple as plain data: the value itself if it is the only one, else a list."""
    return values[0] if len(values) == 1 else list(values)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain(dict(values)).items()}


def _nearest_rule_key(unknown: str) -> str:
    near = closest(unknown, RULE_KEYS, 1)
    return f" Or the rule's own key {near!r}?" if near else ""


def is_empty(value: Any) -> bool:
    """Return whether a value stands for nothing where a list or a mapping is wanted."""
    return isinstance(value, (Mapping, Sequence)) and not len(value)


def is_text_or_texts(value: Any) -> bool:
    """Return whether a value of a spec file is a text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value))


def check_patterns(patterns: Sequence[str], label: str) -> list[SpecError]:
    """Return what is wrong with the globs of a rule or an entry, each with its label."""
    found: list[SpecError] = []
    positive = [pattern for pattern in patterns if not (isinstance(pattern, str) and pattern.startswith("!"))]
    if not positive:
        found.append(SpecError(f"{label} needs at least one pattern that is not an exclusion"))
    for pattern in patterns:
        if not isinstance(pattern, str):
            found.append(OptionError(f"{label}: a pattern is a text, not {shown(pattern)}"))
            continue
        try:
            if not pattern.removeprefix("!").startswith("@"):
                compile_glob(pattern.removeprefix("!"))
        except SpecError as error:
            found.append(type(error)(f"{label}: {error}"))
    return found


def check_alias(name: str, patterns: Iterable[Any]) -> list[SpecError]:
    """Return what is wrong with the globs of a named position."""
    if not isinstance(name, str):
        return [OptionError(f"the name of an alias is a text, not {shown(name)}")]
    found: list[SpecError] = []
    for pattern in patterns:
        if not isinstance(pattern, str):
            found.append(
                OptionError(f"alias '@{brief(name)}' must be a pattern or a list of patterns, not {shown(pattern)}")
            )
            continue
        if pattern.removeprefix("!").startswith("@"):
            found.append(
                PatternError(f"alias '@{brief(name)}': {shown(pattern)} is another alias; write its patterns out")
            )
            continue
        try:
            compile_glob(pattern.removeprefix("!"))
        except SpecError as error:
            found.append(type(error)(f"alias '@{brief(name)}': {error}"))
    return found


def _check_where(where: Any, label: str) -> list[SpecError]:
    if not isinstance(where, Mapping):
        return [OptionError(f"{label}: where must be a mapping, not {shown(where)}")]
    found: list[SpecError] = []
    for key, value in where.items():
        if key not in WHERE:
            near = closest(str(key), WHERE) if isinstance(key, str) else ""
            hint = f"Closest: {near}. " if near else ""
            found.append(OptionError(f"{label}: unknown key {shown(key)} in where. {hint}Known: {', '.join(WHERE)}."))
            continue
        pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_whole, value))
        number = is_whole(value) or (key == "kernel_size" and pair)
        if not (isinstance(value, bool) if key == "depthwise" else number):
            found.append(OptionError(f"{label}: {key} in where must be {WHERE[key]}, not {shown(value)}"))
    return found


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_output(value: Any) -> bool:
    """Return whether a value can name an entry of a module's output: an index or a key."""
    return (is_whole(value) and -_MOST <= value <= _MOST) or (isinstance(value, str) and len(value) <= 1000)


def is_rate(value: Any) -> bool:
    """Return whether a value can be a relative learning rate."""
    return fits(value, float) and value >= 0


def _check_lr_mult(lr_mult: Any, label: str, name: str = "lr_mult") -> list[SpecError]:
    if is_rate(lr_mult):
        return []
    return [OptionError(f"{label}: {name} must be a number of at least 0, not {shown(lr_mult)}")]
