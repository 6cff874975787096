"""Build what a plan asks for, and put it into the model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..adapters.registry import make_adapter
from ..errors import HostError, StateError
from ..hosts.buffers import adopt, give, remember
from ..hosts.guards import can_be_lean, swap_refusal
from ..hosts.journal import Journal, all_parameters, named_parameters
from ..hosts.keeping import note_mode
from ..hosts.model import AdaptedModel
from ..hosts.modules import device_and_dtype, is_batchnorm_like, is_within, unique_modules
from ..hosts.records import AdapterRecord, ModelState
from ..hosts.slots import BASE, StoredTensors, base_class
from ..hosts.steps import watch_steps
from ..hosts.swap import adapt, can_be_kept_training, wants_training
from ..hosts.trained import train_only
from ..hosts.transaction import change
from ..hosts.transactions import protect
from ..hosts.unfrozen import tensors_of
from ..planning.plan import PlannedLayer
from .switching import Switch, note_training, switch

_FORBIDDEN = set("./\\ \t\n")


@dataclass
class Built:
    """Everything that one adapter brings, made before the model is touched.

    Attributes:
        adapters: by layer.
        tensors: its own values of unfrozen modules, by module.
        buffers: its own of other modules, that training moved, by module.
    """

    adapters: dict[str, Adapter]
    tensors: dict[str, StoredTensors]
    buffers: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def check_name(root: nn.Module, name: str) -> None:
    """Raise a StateError if an adapter cannot be called ``name``, or the model has one of that name."""
    if not isinstance(name, str) or not name or name.startswith("_") or set(name) & _FORBIDDEN:
        raise StateError(
            f"{name!r} is no adapter name: use a text without dots, slashes or blanks that does not begin with '_'"
        )
    handle = AdaptedModel.find(root)
    if handle is not None and name in handle.state.adapters:
        raise StateError(
            f"an adapter {name!r} is already in the model. Take another name, or convpeft.eject(model, {name!r}) first."
        )


def build(
    modules: Mapping[str, nn.Module],
    layers: Sequence[PlannedLayer],
    unfrozen: Iterable[str],
    value_of: Callable[[str, str, Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Built:
    """Return the adapters of planned layers and the values of unfrozen modules, each on the device of its module.

    Args:
        modules: of the model, by name.
        layers: to adapt.
        unfrozen: names of modules that train along. A tensor that two of them share stays one tensor.
        value_of: gives a value from the names of module and tensor, and the base's own; unset, a copy of the base's own.
        dtype: of the adapters; unset, that of each module.
    """
    adapters: dict[str, Adapter] = {}
    model = AdaptedModel.find(modules[""])
    if model is not None:
        note_training(model)
    for layer in layers:
        host = modules[layer.name]
        device, own = device_and_dtype(host, modules[""])
        adapter = make_adapter(layer.kind, layer.site, layer.options, device)
        adapters[layer.name] = adapter.to(dtype=dtype or own).train(wants_training(host))
    made: dict[int, Tensor] = {}
    stores: dict[str, StoredTensors] = {}
    for name in unfrozen:
        stores[name] = store = StoredTensors()
        store.copied = value_of is None
        adopt(modules[name])
        for key, tensor in tensors_of(modules[name], BASE).items():
            is_parameter = isinstance(tensor, nn.Parameter)
            if id(tensor) not in made:
                value = tensor.detach().clone() if value_of is None else value_of(name, key, tensor)
                made[id(tensor)] = nn.Parameter(value, value.is_floating_point()) if is_parameter else value
            place: dict = store._parameters if is_parameter else store._buffers
            place[key] = made[id(tensor)]
    return Built(adapters, stores)


def install(root: nn.Module, name: str, record: AdapterRecord, built: Built, *, lean: bool) -> None:
    """Put built parts into the model under ``name`` and make it the active adapter, in place, or change nothing.

    Raises:
        StateError: if the model is part of one that has adapters, or is routed, or another thread runs it.
        HostError: if a module does not allow its class to be swapped.
    """
    model = AdaptedModel.find(root)
    modules = unique_modules(root)
    if model is None:
        norms = [key for key, module in modules if is_batchnorm_like(module)]
        model = AdaptedModel(root, ModelState(requires_grad=_flags(root), norms=norms))
    state = model.state
    model.require_unrouted()
    wanted = {key: model.module(key) for key in _to_swap(modules, state, record, lean)}
    for key, module in wanted.items():
        refusal = swap_refusal(module)
        if refusal:
            raise HostError(f"{key or '(root)'} ({base_class(module).__name__}): {refusal}")
    model.require_hosts()
    present = list(state.swapped)

    def work(journal: Journal) -> None:
        journal.keep(state.__dict__, state.adapters, state.swapped, state.in_training, state.phase.__dict__)
        for key in dict.fromkeys([*present, *wanted]):
            journal.keep_module(model.module(key))
        remember([module for _, module in modules], state.phase, journal)
        for module in wanted.values():
            adapt(module)
        state.swapped += [key for key in wanted if key not in set(present)]
        for key, adapter in built.adapters.items():
            model.slots(key).put(name, adapter, record.layers[key].output)
        for key, tensors in built.tensors.items():
            model.slots(key).put_owner(name, tensors)
        for key, buffers in built.buffers.items():
            give(model.module(key), name, buffers, journal)
        for key in state.swapped:
            slots = model.slots(key)
            slots.lean, slots.state, slots.key, slots.phase = lean, state, key, state.phase
            note_mode(slots, slots.wanted_training)
        state.adapters[name] = record
        for parameter in all_parameters(root):
            journal.require_grad(parameter, False)
        switch(Switch.to(model, (name,)), journal)
        train_only(model, (name,), journal)
        protect(root, journal)

    change(root, state, work, [model.slots(key) for key in present], since=model.since)
    watch_steps(root)


def _flags(root: nn.Module) -> dict[str, bool]:
    """Return whether each parameter requires a gradient, by each of its names."""
    return {key: parameter.requires_grad for key, parameter in named_parameters(root)}


def _to_swap(
    modules: Sequence[tuple[str, nn.Module]], state: ModelState, record: AdapterRecord, lean: bool
) -> dict[str, None]:
    """Return the names of all modules whose class must be swapped, in order.

    Those are hosts, unfrozen modules and norms, and parents that could freeze what trains; with ``lean``, frozen layers
    that can save less for backward.
    """
    wanted = dict.fromkeys([*record.layers, *record.owned, *state.norms])
    if lean:
        wanted.update({key: None for key, module in modules if can_be_lean(module)})
    for key, module in modules:
        if can_be_kept_training(module) and any(is_within(each, key) for each in (*record.layers, *record.owned)):
            wanted[key] = None
    return wanted
