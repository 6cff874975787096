"""Audit a training: what trains, in which group of the optimizer and at which rate, what is frozen, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import OptionError, StateError, shortened
from ..hosts.keeping import is_frozen
from ..hosts.model import AdaptedModel
from ..hosts.modules import base_class
from ..hosts.steps import REMEDY, parameters_of, watch_steps
from ..planning.tables import table
from .training import grouped

_SAME_RATE = 1e-6  # relative: rates in one ratio to lr_mult differ by rounding only
Group = tuple[str, float | None, float | None]  # what an optimizer's group is called, its rate and its weight decay


@dataclass(frozen=True)
class AuditRow:
    """Parameters that train alike.

    Attributes:
        part: adapter and kind, or *unfrozen*; *base* for what is the base's.
        tensors, parameters: how many.
        lr_mult: relative learning rate that the spec asks for; None for the base.
        group: name or number of the optimizer's group; *none* when no group holds them.
        lr, weight_decay: of that group now; None without one.
    """

    part: str
    tensors: int
    parameters: int
    lr_mult: float | None
    group: str
    lr: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class AuditReport:
    """What trains in a model and how; print it.

    Attributes:
        rows: all that trains, or that the optimizer would change.
        frozen_parameters: of the base, that require no gradient.
        held_norms, norms: norms that are held in eval mode, and all there are.
        active: names of the active adapters.
        problems: what is wrong, each with its remedy.
    """

    rows: tuple[AuditRow, ...]
    frozen_parameters: int
    held_norms: int
    norms: int
    active: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        names = ", ".join(self.active) or "none"
        frozen = (
            f"frozen: {self.frozen_parameters:,} parameters of the base; norms held: {self.held_norms} of {self.norms}"
        )
        titles = ("trains", "tensors", "parameters", "lr_mult", "group", "lr", "weight decay")
        cells = [
            (
                row.part, f"{row.tensors:,}", f"{row.parameters:,}", _number(row.lr_mult), row.group, _number(row.lr),
                _number(row.weight_decay),
            )
            for row in self.rows
        ]  # fmt: skip
        wrong = [f"wrong: {problem}" for problem in self.problems] or ["nothing is wrong"]
        return "\n".join([f"active adapters: {names}", table(titles, cells), frozen, *wrong])

    def require_ok(self) -> None:
        """Raise a StateError with all that is wrong; do nothing if nothing is."""
        if self.problems:
            raise StateError("; ".join(self.problems))


def audit(model: nn.Module, optimizer: Any = None) -> AuditReport:
    """Return what trains in a model, in which group of the optimizer and at which rate, what is frozen, and what is wrong.

    Nothing is changed, and the model does not run. Wrong is what a training would not tell by itself: no adapter in the
    model or none active, adapters that the optimizer does not hold (it was built before them), inactive adapters or thawed
    base parameters that it does, rates that are not in the ratio of ``lr_mult``, parameters that somebody froze, norms
    that are not held, a layer that was replaced.

    Args:
        model: any module. One without adapters is reported as such: a trainer may have built it anew.
        optimizer: whatever has torch's ``param_groups``, the wrappers of accelerate, Lightning and mmengine included, or a
            list of such. Unset, the groups that ``param_groups`` would make are shown, with no rates.

    Raises:
        OptionError: if an optimizer has no ``param_groups``.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> _ = convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}, name="screw")
        >>> audit(model, optimizer).ok
        False
        >>> print(audit(model, torch.optim.SGD(convpeft.param_groups(model, lr=0.1))))
        active adapters: screw
        trains      tensors  parameters  lr_mult  group       lr   weight decay
        ----------  -------  ----------  -------  ----------  ---  ------------
        screw.lora        2          70        1  screw.lora  0.1             0
        frozen: 224 parameters of the base; norms held: 0 of 0
        nothing is wrong
    """
    groups = _groups(optimizer)
    adapted = AdaptedModel.find(model)
    if adapted is None:
        return _without_adapters(model, groups)
    watch_steps(adapted.root)
    try:
        adapted.require_hosts()
    except StateError as error:
        return AuditReport((), 0, 0, len(adapted.state.norms), adapted.state.active, (str(error),))
    return _Audit(adapted, groups).report()


def _groups(optimizer: Any) -> list[dict[str, Any]] | None:
    """Return the groups of an optimizer, or of several, with a name each; None without one."""
    if optimizer is None:
        return None
    several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    found = []
    for each in several:
        groups = getattr(each, "param_groups", None)
        if not isinstance(groups, (list, tuple)):
            raise OptionError(
                f"a {type(each).__name__} has no param_groups: give audit the optimizer that makes the steps"
            )
        found += [
            {"name": str(group.get("name") or f"group {number}"), **_plain(group)}
            for number, group in enumerate(groups)
        ]
    return found


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group.get(key) for key in ("params", "lr", "weight_decay")}


def _without_adapters(model: nn.Module, groups: list[dict[str, Any]] | None) -> AuditReport:
    held = {id(parameter): group["name"] for group in groups or () for parameter in group["params"]}
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = "none" if not any(id(parameter) in held for parameter in trains) else next(iter(held.values()))
    row = AuditRow("base", len(trains), sum(p.numel() for p in trains), None, group if groups else "–", None, None)
    text = (
        f"this {base_class(model).__name__} has no adapters, and its own parameters train. If you injected some, the trainer "
        "has built another model since (ultralytics does: convpeft.integrations.ultralytics.trainer): inject into the model "
        "that trains, where it is built"
    )
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return AuditReport((row,), frozen, 0, 0, (), (text,))


class _Audit:
    """One audit: the parameters of the model by owner, beside the groups of the optimizer."""

    def __init__(self, adapted: AdaptedModel, groups: list[dict[str, Any]] | None) -> None:
        self.adapted, self.state, self.groups = adapted, adapted.state, groups
        self.own, self.base = parameters_of(adapted.root, self.state)
        self.parameters = {id(parameter): parameter for parameter in adapted.root.parameters()}
        self.wanted = {
            id(parameter): (group["name"].removesuffix(" (no decay)").partition(" x")[0], group["lr_mult"])
            for group in grouped(adapted, 1.0, 0.0)
            for parameter in group["params"]
        }
        self.found: dict[int, Group] = {}
        for group in self._shown_groups():
            for parameter in group["params"]:
                self.found.setdefault(id(parameter), (group["name"], group["lr"], group["weight_decay"]))
        self.thawed = [key for key in self.base if key in self.parameters and self.parameters[key].requires_grad]

    def _shown_groups(self) -> list[dict[str, Any]]:
        if self.groups is not None:
            return self.groups
        return [{**group, "lr": None, "weight_decay": None} for group in grouped(self.adapted, 1.0, 0.0)]

    def report(self) -> AuditReport:
        """Return the report."""
        norms = [self.adapted.module(key) for key in self.state.norms]
        frozen = sum(
            self.parameters[key].numel() for key in self.base if key in self.parameters and key not in self.thawed
        )
        held = sum(not norm.training for norm in norms) if self.state.held else 0
        problems = tuple(self._problems(norms))
        return AuditReport(tuple(self._rows()), frozen, held, len(norms), self.state.active, problems)

    def _rows(self) -> Iterator[AuditRow]:
        none: Group = ("none", None, None)
        rows: dict[tuple[str, float | None, Group], list[int]] = {}
        for key, (part, lr_mult) in self.wanted.items():
            rows.setdefault((part, lr_mult, self.found.get(key, none)), []).append(key)
        for key in self.thawed:
            rows.setdefault(("base (thawed)", None, self.found.get(key, none)), []).append(key)
        for (part, lr_mult, group), keys in rows.items():
            yield AuditRow(part, len(keys), sum(self.parameters[key].numel() for key in keys), lr_mult, *group)

    def _problems(self, norms: list[nn.Module]) -> Iterator[str]:
        if not self.state.active:
            yield "no adapter is active, so nothing of any trains: convpeft.set_active(model, name)"
        if self.groups is not None:
            yield from self._unheld()
            yield from self._rates()
        if self.thawed:
            names = shortened(sorted(self.base[key] for key in self.thawed), 3)
            yield (
                f"{len(self.thawed)} parameters of the base require gradients again ({names}): the adapter would belong to a base "
                "that nobody keeps. Name them in the spec (unfreeze: ...), or freeze them: convpeft.set_active(model, name) after "
                "requires_grad_(False)"
            )
        frozen = [
            f"{key or '(root)'}: {name}"
            for name in (() if self.state.resting else self.state.trained)
            for key, module in self.adapted.touched([name]).items()
            if is_frozen(module, self.adapted.slots(key), name)
        ]
        if frozen:
            yield (
                f"{len(frozen)} layers of active adapters are frozen by somebody else ({shortened(frozen, 3)}): "
                "convpeft.set_active(model, name) lets them train again"
            )
        loose = sum(norm.training for norm in norms) if self.state.held else 0
        if loose:
            yield (
                f"{loose} of {len(norms)} norms are in training mode though convpeft holds them: somebody set their attribute "
                "training; model.train() and model.eval() keep them"
            )

    def _unheld(self) -> Iterator[str]:
        """Yield what the optimizer lacks, and what it holds that is not to train."""
        left = [self.own[key] for key in self.wanted if key not in self.found]
        if left:
            yield (
                f"the optimizer holds {len(self.wanted) - len(left)} of the {len(self.wanted)} tensors that are to train; it lacks "
                f"{shortened(left, 3)}. {REMEDY}"
            )
        counts = Counter(id(parameter) for group in self.groups or () for parameter in group["params"])
        twice = [self.own[key] for key in self.wanted if counts[key] > 1]
        if twice:
            yield f"{len(twice)} tensors are in several groups, and would make several steps at once ({shortened(twice, 3)})"
        resting = [key for key in self.found if key in self.parameters and key not in self.own and key not in self.base]
        if resting and left:
            yield (
                f"the optimizer holds {len(resting)} tensors of adapters that are not active, which it does not train. Build an "
                "optimizer for each adapter, or let them be active together: convpeft.set_active(model, [...])"
            )

    def _rates(self) -> Iterator[str]:
        """Yield a problem if the rates of the groups are not in the ratio of the spec's lr_mult."""
        bases: dict[float, str] = {}
        for key, (part, lr_mult) in self.wanted.items():
            _, lr, _ = self.found.get(key, ("", None, None))
            if lr is not None and lr_mult > 0:
                bases.setdefault(float(lr) / lr_mult, f"{part} with lr_mult {lr_mult:g} has rate {float(lr):g}")
        if bases and max(bases) - min(bases) > _SAME_RATE * max(map(abs, bases)):
            low, high = bases[min(bases)], bases[max(bases)]
            yield (
                f"the rates are not in the ratio of lr_mult: {low}, and {high}. Give the optimizer "
                "convpeft.param_groups(model, lr=...); a schedule that scales all groups alike keeps the ratio"
            )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{float(value):g}"
