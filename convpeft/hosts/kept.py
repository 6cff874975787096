"""What one module remembers of its buffers: the base's, each adapter's own, and the plain attributes that go with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .records import Phase
from .slots import BASE, KEPT, SLOT, Slots, slots_of

_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has
_PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, set)
_MOST_ENTRIES = 64


@dataclass
class Values:
    """Buffers of one module as one owner has them.

    Attributes:
        buffers: by name.
        hidden: names of those that no state_dict shows.
        attributes: plain attributes of the module that go with them (the size that a grid was made for); None: as they are.
    """

    buffers: dict[str, Tensor | None] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    attributes: dict[str, Any] | None = None


@dataclass
class Kept:
    """What a module remembers of its buffers.

    Attributes:
        phase: shared by all modules of the model.
        base: all buffers of the base, as copies that nobody writes into.
        own: by adapter, those that became others while it was active.
        shown: the adapter whose own are in the module now, or None.
        between: its buffers are being exchanged, or an exchange was interrupted: ``own`` is right, the module is not.
        built: what the module was made of; one that was rebuilt since keeps what it was given.
    """

    phase: Phase
    base: Values
    own: dict[str, Values] = field(default_factory=dict)
    shown: str | None = None
    between: bool = False
    built: tuple[Any, ...] = ()


def kept_of(module: nn.Module) -> Kept | None:
    """Return what a module remembers of its buffers, or None."""
    return module.__dict__.get(KEPT)


def users_modules(root: nn.Module) -> list[nn.Module]:
    """Return each of the user's modules once, none of convpeft's, and nothing below TorchScript."""
    seen: set[int] = set()
    found: list[nn.Module] = []
    left = [root]
    while left:
        module = left.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if not isinstance(module, Slots) and not issubclass(type(module), torch.jit.ScriptModule):
            found.append(module)
            left.extend(module._modules.values())  # type: ignore[arg-type]
    return found


def owner_of(kept: Kept) -> str | None:
    """Return the adapter that gets what moved."""
    active = kept.phase.active
    return kept.shown or next((name for name in active if name in kept.own), active[0] if active else None)


def is_held(module: nn.Module) -> bool:
    """Return whether a module is a norm that stays in eval mode."""
    slots = slots_of(module)
    return slots is not None and slots.held


def is_saved(kept: Kept, name: str) -> bool:
    """Return whether a buffer is one of the base's that a state_dict shows."""
    return kept.base.buffers.get(name) is not None and name not in kept.base.hidden


def free_names(module: nn.Module, kept: Kept, names: Iterable[str]) -> list[str]:
    """Return those of the names that are buffers, or none yet, and not exchanged with the module's unfrozen tensors."""
    slots = slots_of(module)
    away: Any = slots.stored(BASE)._buffers if slots is not None and slots.shown is not None else ()
    taken = (module._parameters, module.__dict__, module._modules)
    return [name for name in names if name not in away and not any(name in place for place in taken)]


def moved_in(module: nn.Module, kept: Kept) -> Values | None:
    """Return the buffers that are not the base's, with the attributes that go with them, or None."""
    names = dict.fromkeys(kept.base.buffers)
    if kept.built and module._buffers.keys() - names.keys() and kept.built == parts_of(module):
        names.update(dict.fromkeys(module._buffers))  # else others put them here (pruning, spectral norm)
    elif names.keys() <= module._buffers.keys() and all(
        now is not None and same_bits(kept.base.buffers[name], now)
        for name, now in module._buffers.items()
        if name in names
    ):
        return None
    moved: dict[str, Tensor | None] = {}
    for name in free_names(module, kept, names):
        base, now = kept.base.buffers.get(name), module._buffers.get(name)
        if base is not None and now is not None:
            base = kept.base.buffers[name] = as_here(base, now)
        if not same_bits(base, now):
            moved[name] = now.detach() if now is not None and now.requires_grad else now
    if not moved:
        return None
    hidden = frozenset(module._non_persistent_buffers_set)
    return Values(moved, hidden, None if kept.base.attributes is None else attributes_of(module))


def put_in(module: nn.Module, values: Values, names: Iterable[str], copies: dict[int, Tensor] | None) -> None:
    """Put an owner's buffers into the module, in place: those of the names that it does not have are taken out.

    Args:
        module: to change.
        values: of the owner.
        names: of the buffers to exchange.
        copies: that were put in so far, by the ``id`` of what they were copied from; None to put in no copies.
    """
    hidden = module._non_persistent_buffers_set
    for name in names:
        now, value = module._buffers.get(name), values.buffers.get(name)
        if name not in values.buffers:
            module._buffers.pop(name, None)
            hidden.discard(name)
            continue
        if value is not None:
            if copies is not None:
                value = copies.setdefault(id(value), copied(value))
            value = value.to(_device(module, value)) if now is None else as_here(value, now)
        module._buffers[name] = value
        (hidden.add if name in values.hidden else hidden.discard)(name)
    if values.attributes is not None:
        _put_attributes(module, values.attributes)
    if copies is not None and list(module._buffers)[: len(values.buffers)] != list(values.buffers):
        for name in values.buffers:  # one that was taken out and made again goes back to its place
            if name in module._buffers:
                module._buffers[name] = module._buffers.pop(name)


def _device(module: nn.Module, value: Tensor) -> torch.device:
    """Return where a buffer belongs that the module does not have now: beside its other tensors."""
    beside = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    return beside[0].device if beside else value.device


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes that a module keeps beside its buffers, containers copied; ``...`` for all others."""
    found: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in _TORCH or name == KEPT:
            continue
        if type(value) in _PLAIN:
            found[name] = value
        elif type(value) in _CONTAINERS and len(value) <= _MOST_ENTRIES:
            found[name] = copy.copy(value)
        else:
            found[name] = ...
    return found


def _put_attributes(module: nn.Module, wanted: dict[str, Any]) -> None:
    """Set a module's plain attributes as they were, in place."""
    now = attributes_of(module)
    for name in now.keys() - wanted.keys():
        if now[name] is not ...:
            del module.__dict__[name]
    for name, value in wanted.items():
        is_objects = now.get(name) is ... and not isinstance(module.__dict__[name], Tensor)
        if value is not ... and not is_objects and not (name in now and _is_like(now[name], value)):
            module.__dict__[name] = copy.copy(value)


def _is_like(one: Any, other: Any) -> bool:
    if type(one) is not type(other) or type(one) in _PLAIN:
        return type(one) is type(other) and bool(one == other)
    if isinstance(one, set):
        return one == other
    if isinstance(one, dict):
        return list(one) == list(other) and all(_is_entry(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(_is_entry, one, other))


def _is_entry(one: Any, other: Any) -> bool:
    return one is other or (type(one) in _PLAIN and type(one) is type(other) and bool(one == other))


def parts_of(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module is made of, to see whether others rebuilt it."""
    children = tuple(name for name in module._modules if name != SLOT)
    return tuple(module._parameters), children, tuple(module._forward_pre_hooks), tuple(module._forward_hooks)


def copied(tensor: Tensor) -> Tensor:
    """Return a copy outside of autograd's graph and of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def as_here(value: Tensor, like: Tensor) -> Tensor:
    """Return a value on the device of another and, if both are floating, in its dtype: the model was converted."""
    if value.is_meta or like.is_meta:
        return copied(like) if value.is_meta else value
    floating = value.is_floating_point() and like.is_floating_point()
    return value.to(like.device, like.dtype if floating else value.dtype)


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors have the same bits."""
    if one is None or other is None or one is other:
        return one is other
    if any(getattr(one, each) != getattr(other, each) for each in ("shape", "dtype", "layout", "device")):
        return False
    if one.is_meta or other.is_meta:
        return True
    if type(one) is not Tensor or one.layout != torch.strided or one.is_quantized:
        return _same_values(one, other)
    return torch.equal(_bits(one), _bits(other))


def _same_values(one: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(one, other)
    except (RuntimeError, NotImplementedError):
        return torch.equal(one.to_dense(), other.to_dense())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8) if tensor.is_floating_point() else tensor


def is_norm_like(buffers: Iterable[str]) -> bool:
    """Return whether a module with these buffers is a norm that is held."""
    return {"running_mean", "running_var"} <= set(buffers)
