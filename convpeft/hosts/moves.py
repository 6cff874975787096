"""Modules that somebody moved after ``inject``: the records follow them, and say which are lost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import StateError
from .modules import unique_modules
from .records import ModelState
from .slots import slots_of


def follow_moves(root: nn.Module, state: ModelState) -> None:
    """Give moved modules their new names in the records, and forget frozen layers that were taken out, in place.

    Raises:
        StateError: if a norm or a module that carries something is gone, or a layer was replaced by one that trains.
    """
    modules = dict(unique_modules(root))
    found = {name: slots for name, module in modules.items() if (slots := slots_of(module)) is not None}
    found = {name: slots for name, slots in found.items() if slots.state is state}
    now = {slots.key: name for name, slots in found.items()}
    _require(modules, now, state)
    for record in state.adapters.values():
        record.layers = {now.get(key, key): layer for key, layer in record.layers.items()}
        record.owned = {now.get(key, key): lr_mult for key, lr_mult in record.owned.items()}
    state.swapped = [now[key] for key in state.swapped if key in now]
    state.in_training = {now[key] for key in state.in_training if key in now}
    state.norms = [now[key] for key in state.norms if key in now]
    state.requires_grad = {_renamed(key, now): flag for key, flag in state.requires_grad.items()}
    for name, slots in found.items():
        slots.key = name


def _require(modules: Mapping[str, nn.Module], now: Mapping[str, str], state: ModelState) -> None:
    """Raise if the model lost something: ``now`` has the present names of the modules that are still there."""
    carrying = {key for record in state.adapters.values() for key in (*record.layers, *record.owned)}
    carrying |= {*state.norms}  # folded into a layer, say, whose weight is another one then
    for key in state.swapped:
        if key in now:
            continue
        instead = modules.get(key)
        if instead is not None and slots_of(instead) is None:
            trains = any(parameter.requires_grad for parameter in instead.parameters())
            if key in carrying or trains:
                raise StateError(f"{key!r} was adapted and has been replaced by a plain {type(instead).__name__}")
        elif key in carrying:
            raise StateError(f"{key!r} was adapted and is no longer in the model: it was changed after inject()")


def _renamed(key: str, now: Mapping[str, str]) -> str:
    """Return a parameter's name after its module was moved."""
    module, _, name = key.rpartition(".")
    return f"{now[module]}.{name}" if now.get(module) else key
