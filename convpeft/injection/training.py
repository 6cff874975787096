"""What trains: parameter groups for an optimizer, auxiliary losses, counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, StateError, shown
from ..hosts.model import AdaptedModel
from ..hosts.modules import base_modules, device_and_dtype
from ..hosts.slots import BASE
from ..hosts.steps import watch_steps
from ..hosts.unfrozen import tensors_of
from ..planning.rules import is_rate
from ..planning.tables import table


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, up_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Return the active adapters' trainable parameters as groups for a torch optimizer.

    Each group has ``params``, ``lr`` (``lr * lr_mult``, times ``up_mult`` for weights that start at zero), ``weight_decay`` (0 for norm, bias and scale parameters), and
    for logging ``lr_mult`` and ``name``. Every trainable parameter is in exactly one group.

    Args:
        model: an injected model.
        lr: the rate of a rule with ``lr_mult: 1``.
        weight_decay: of weights.
        up_mult: relative rate of the weights that start at zero and end an update: B of LoRA, U of Rep-MoNA. A rule's own
            ``up_mult`` wins. LoRA+ derives that B has to go faster than A for both to learn; 4 is a good value here, and the
            paper's 16 for wide language models.

    Raises:
        OptionError: if ``up_mult`` is no rate.
        StateError: if nothing is injected, an adapted layer or held norm was replaced since, or all of the active adapters was
            frozen since.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> _ = convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2, "lr_mult": 0.5}]})
        >>> [(g["name"], g["lr"], g["weight_decay"]) for g in param_groups(model, lr=0.1, weight_decay=0.05)]
        [('default.lora x0.5', 0.05, 0.05)]
        >>> [(g["name"], g["lr"]) for g in param_groups(model, lr=0.1, up_mult=4)]
        [('default.lora x0.5', 0.05), ('default.lora x2', 0.2)]

    Reference: Hayou et al., LoRA+, arXiv:2402.12354, section 3.
    """
    if not is_rate(up_mult):
        raise OptionError(f"up_mult must be a number of at least 0, not {shown(up_mult)}")
    adapted = AdaptedModel.of(model)
    adapted.require_hosts()
    watch_steps(adapted.root)
    groups = grouped(adapted, lr, weight_decay, up_mult)
    if not groups and adapted.state.running and not adapted.state.resting:
        names = ", ".join(adapted.state.running)
        raise StateError(
            f"nothing of the active adapters ({names}) requires a gradient: somebody froze the whole model, as ultralytics does when "
            "it saves and opens a checkpoint. convpeft.set_active(model, name) lets an adapter train again"
        )
    return groups


def grouped(adapted: AdaptedModel, lr: float, weight_decay: float, up_mult: float = 1.0) -> list[dict[str, Any]]:
    """Return what ``param_groups`` does; nothing where nothing requires a gradient."""
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name in adapted.state.running:
        for label, lr_mult, decays, parameter in _trainable(adapted, name, up_mult):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                groups.setdefault((f"{name}.{label}", lr_mult, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * lr_mult,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_mult": lr_mult,
            "name": label + (f" x{lr_mult:g}" if lr_mult != 1 else "") + ("" if decays else " (no decay)"),
        }
        for (label, lr_mult, decays), parameters in groups.items()
    ]


def _trainable(adapted: AdaptedModel, name: str, up_mult: float) -> Iterator[tuple[str, float, bool, nn.Parameter]]:
    """Yield ``(label, lr_mult, decays, parameter)`` for everything of an adapter that requires gradients."""
    record = adapted.record(name)
    for key, adapter in adapted.adapters(name):
        layer, bare, rising = record.layers[key], adapter.no_decay(), adapter.rising()
        faster = up_mult if layer.up_mult is None else layer.up_mult
        for each, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                yield layer.kind, layer.lr_mult * (faster if each in rising else 1.0), each not in bare, parameter
    for key, tensors in adapted.unfrozen(name):
        for tensor in tensors.values():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                yield "unfrozen", record.owned[key], tensor.ndim > 1, tensor


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return the sum of the active adapters' auxiliary losses, a scalar; 0 when none has one."""
    adapted = AdaptedModel.find(model)
    device, _ = device_and_dtype(model)
    total = torch.zeros((), device=device)
    for name in () if adapted is None else adapted.state.running:
        for _, adapter in adapted.adapters(name):  # type: ignore[union-attr]
            loss = adapter.auxiliary_loss()
            if loss is not None:
                total = total + loss
    return total


@dataclass(frozen=True)
class Summary:
    """What is in a model; print it.

    Attributes:
        base_parameters: of the user's model.
        trainable_parameters: that require gradients now.
        active: names of the active adapters.
        rows: for each adapter ``(name, layers, kinds, adapter parameters, unfrozen parameters)``.
    """

    base_parameters: int
    trainable_parameters: int
    active: tuple[str, ...]
    rows: tuple[tuple[str, int, str, int, int], ...]

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(1, self.base_parameters)
        head = f"base {self.base_parameters:,} parameters; trainable now {self.trainable_parameters:,} ({share:.2f} %)"
        if not self.rows:
            return head + "; no adapters"
        cells = [
            (name + (" *" if name in self.active else ""), str(layers), kinds, f"{own:,}", f"{unfrozen:,}")
            for name, layers, kinds, own, unfrozen in self.rows
        ]
        titles = ("adapter (* active)", "layers", "kinds", "parameters", "unfrozen")
        return f"{head}\n{table(titles, cells)}"


def summary(model: nn.Module) -> Summary:
    """Return counts of the base, of each adapter, and of what trains now; also for a model without adapters."""
    adapted = AdaptedModel.find(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if adapted is None:
        return Summary(sum(p.numel() for p in model.parameters()), trainable, (), ())
    base = [_parameters(tensors_of(module, BASE)) for _, module in base_modules(adapted.root)]
    rows = []
    for name, record in adapted.state.adapters.items():
        own = sum(p.numel() for _, adapter in adapted.adapters(name) for p in adapter.parameters())
        unfrozen = [_parameters(tensors) for _, tensors in adapted.unfrozen(name)]
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in record.layers.values()))
        rows.append((name, len(record.layers), kinds, own, _count(unfrozen)))
    return Summary(_count(base), trainable, adapted.state.active, tuple(rows))


def _parameters(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """Return the sizes of those tensors that are parameters, by ``id``."""
    return {id(tensor): tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}


def _count(sizes: Iterable[Mapping[int, int]]) -> int:
    """Return the sum of sizes; what is in several of the mappings counts once."""
    return sum({key: size for each in sizes for key, size in each.items()}.values())
