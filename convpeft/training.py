"""What trains: parameter groups for an optimizer, auxiliary losses, counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import hosting
from .reports import table
from .state import ModelState, adapter_at, find_state, module_at, require_hosts, require_state


def param_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return the active adapters' trainable parameters as groups for a torch optimizer.

    Each group has ``params``, ``lr`` (``lr * lr_mult``), ``weight_decay`` (0 for norm, bias and scale parameters), and
    for logging ``lr_mult`` and ``name``. Every trainable parameter is in exactly one group.

    Args:
        model: an injected model.
        lr: the rate of a rule with ``lr_mult: 1``.
        weight_decay: of weights.

    Raises:
        StateError: if nothing is injected, or an adapted layer or held norm was replaced since.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> _ = convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2, "lr_mult": 0.5}]})
        >>> [(g["name"], g["lr"], g["weight_decay"]) for g in param_groups(model, lr=0.1, weight_decay=0.05)]
        [('default.lora x0.5', 0.05, 0.05)]
    """
    root, state = require_state(model)
    require_hosts(root, state)
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name in state.running:
        for label, lr_mult, decays, parameter in _trainable(root, state, name):
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


def _trainable(root: nn.Module, state: ModelState, name: str) -> list[tuple[str, float, bool, nn.Parameter]]:
    """Return ``(label, lr_mult, decays, parameter)`` for everything of an adapter that requires gradients."""
    found: list[tuple[str, float, bool, nn.Parameter]] = []
    record = state.adapters[name]
    for key, layer in record.layers.items():
        adapter = adapter_at(root, key, name)
        bare = adapter.no_decay()
        found += [
            (layer.kind, layer.lr_mult, n not in bare, p) for n, p in adapter.named_parameters() if p.requires_grad
        ]
    for key, lr_mult in record.owned.items():
        for tensor in hosting.shown_tensors(module_at(root, key), name).values():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                found.append(("unfrozen", lr_mult, tensor.ndim > 1, tensor))
    return found


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return the sum of the active adapters' auxiliary losses, a scalar; 0 when none has one."""
    state = find_state(model)
    device, _ = hosting.device_and_dtype([model])
    total = torch.zeros((), device=device)
    if state is None:
        return total
    root, _ = require_state(model)
    for name in state.running:
        for key in state.adapters[name].layers:
            loss = adapter_at(root, key, name).auxiliary_loss()
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
    state = find_state(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if state is None:
        return Summary(sum(p.numel() for p in model.parameters()), trainable, (), ())
    root, _ = require_state(model)
    base: dict[int, int] = {}
    for _, module in hosting.base_modules(root):
        for tensor in hosting.shown_tensors(module, hosting.BASE).values():
            if isinstance(tensor, nn.Parameter):
                base[id(tensor)] = tensor.numel()
    rows = []
    for name, record in state.adapters.items():
        own = sum(p.numel() for key in record.layers for p in adapter_at(root, key, name).parameters())
        unfrozen = {
            id(tensor): tensor.numel()
            for key in record.owned
            for tensor in hosting.shown_tensors(module_at(root, key), name).values()
            if isinstance(tensor, nn.Parameter)
        }
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in record.layers.values()))
        rows.append((name, len(record.layers), kinds, own, sum(unfrozen.values())))
    return Summary(sum(base.values()), trainable, state.active, tuple(rows))
