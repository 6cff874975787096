"""Buffers that move while adapters train: what they become belongs to the adapter, and the base's own values come back.

A frozen model still moves: losses count, spectral norm iterates, codebooks and centres follow the data, grids are made at
the first pass. Each of the user's modules that has buffers, or may make some, remembers those of the base, and each
adapter's own, in one attribute of the module, so that copies carry them along.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .slots import BASE, KEPT, SLOT, STASH, Slots, base_class, slots_of

Names = tuple[str, ...]
_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has
_PLAIN = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, set)
_MOST_ENTRIES = 64


@dataclass
class Phase:
    """What happened to a model since adapters were last switched; its modules share one.

    Attributes:
        active: names of the adapters that were made active then.
        trained: some module was in training mode: buffers that are others now were moved by training.
        own: some adapter has buffers of its own.
    """

    active: Names = ()
    trained: bool = False
    own: bool = False


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
        built: what the module was made of; one that was rebuilt since keeps what it was given.
    """

    phase: Phase
    base: Values
    own: dict[str, Values] = field(default_factory=dict)
    shown: str | None = None
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


def remember(modules: Iterable[nn.Module], phase: Phase) -> None:
    """Let every one of the user's modules that has buffers, or may make some, remember those of the base, in place; what is known stays.

    Classes of torch make no buffers later and keep nothing beside them.
    """
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays one
    with torch.inference_mode(False), torch.no_grad():
        for module in modules:
            phase.trained |= module.training
            is_torchs = base_class(module).__module__.startswith("torch.nn.modules.")
            if (
                KEPT in module.__dict__
                or (is_torchs and not module._buffers)
                or isinstance(module, torch.jit.ScriptModule)
            ):
                continue
            base: dict[str, Tensor | None] = {}
            for name, tensor in module._buffers.items():
                if tensor is not None and id(tensor) not in copies:
                    copies[id(tensor)] = tensor.clone()
                base[name] = None if tensor is None else copies[id(tensor)]
            hidden = frozenset(module._non_persistent_buffers_set)
            if is_torchs:
                module.__dict__[KEPT] = Kept(phase, Values(base, hidden))
            else:
                module.__dict__[KEPT] = Kept(phase, Values(base, hidden, _attributes(module)), built=_built(module))
            if base and not is_norm_like(base):  # norms are held, and have a class of ours
                module._register_state_dict_hook(_mark)
                module._register_load_state_dict_pre_hook(load_buffers, with_module=True)


def forget(root: nn.Module) -> None:
    """Drop what modules remember of their buffers, in place; what they show now is all there is."""
    for module in users_modules(root):
        if module.__dict__.pop(KEPT, None) is None:
            continue
        for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (load_buffers, _mark)]:
                del hooks[key]


def put_away(root: nn.Module, phase: Phase, *, held: bool = False) -> list[nn.Module]:
    """Give what training moved to the adapter that was active, and put the base's own buffers back, in place.

    Where no adapter was active, what moved is dropped: the base is frozen. What changed while nothing was in training mode
    was written by hand, or is a grid made for another size of image: it stays.

    Args:
        root: of the model.
        phase: of the model.
        held: put back those of held norms, too, which move by force only.

    Returns:
        The modules of which an adapter has buffers of its own.
    """
    if not (phase.trained or phase.own or held):
        return []
    copies: dict[int, Tensor] = {}
    trains, owned = False, []
    for module in users_modules(root):
        trains |= module.training
        kept = kept_of(module)
        if kept is None or not (kept.base.buffers or module._buffers):
            continue
        if kept.shown is not None or (held if _is_held(module) else phase.trained):
            moved, owner = _moved(module, kept), _owner(kept)
            if owner is not None and (moved or kept.shown == owner):
                kept.own[owner] = moved or Values()
            if moved:
                _put(module, kept.base, moved.buffers, copies)
            kept.shown = None
        if kept.own:
            owned.append(module)
    phase.trained = trains
    return owned


def bring_out(modules: list[nn.Module], phase: Phase, names: Names) -> None:
    """Show the buffers that the adapters active from now on have of their own in place of the base's, in place.

    Of several adapters, the first that has buffers of a module shows these.

    Args:
        modules: that ``put_away`` returned.
        phase: of the model.
        names: of the adapters.
    """
    for module in modules:
        kept = kept_of(module)
        owner = next((name for name in names if name in kept.own), None) if kept is not None else None
        if kept is not None and owner is not None:
            values = kept.own[owner]
            _put(module, values, _free(module, kept, values.buffers), None)
            kept.shown = owner
    phase.active, phase.own = names, bool(modules)


def own_buffers(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yield each module with the buffers that an adapter has of its own and a state_dict can bring back, by name.

    A buffer that the base does not have is not among them: the module made it, and makes it again.
    """
    for module in users_modules(root):
        kept = kept_of(module)
        if kept is None or not kept.base.buffers:
            continue
        if kept.shown == name or (kept.phase.trained and _owner(kept) == name and not _is_held(module)):
            values = _moved(module, kept)
        else:
            values = kept.own.get(name)
        found = {} if values is None else values.buffers
        tensors = {key: tensor for key, tensor in found.items() if tensor is not None and _is_saved(kept, key)}
        if tensors:
            yield module, tensors


def give(module: nn.Module, name: str, buffers: dict[str, Tensor]) -> None:
    """Let an adapter have its own buffers of a module, in place; they are not shown yet."""
    kept = kept_of(module)
    if kept is not None:
        kept.own[name] = Values(dict(buffers), kept.base.hidden)
        kept.phase.own = True


def drop(root: nn.Module, name: str) -> None:
    """Forget an adapter's own buffers, in place; they must not be shown."""
    for module in users_modules(root):
        kept = kept_of(module)
        if kept is not None:
            kept.own.pop(name, None)


def adopt(module: nn.Module) -> None:
    """Take the buffers that a module shows as the base's from now on, in place, unless training moved them.

    Somebody wrote them by hand, then.
    """
    kept = kept_of(module)
    if kept is not None and kept.shown is None and not kept.phase.trained:
        for name in _free(module, kept, kept.base.buffers):
            now = module._buffers.get(name)
            kept.base.buffers[name] = None if now is None else _copy(now)


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of the base that a state_dict has, by name, whoever's are shown."""
    kept = kept_of(module)
    if kept is None:
        hidden = module._non_persistent_buffers_set
        return {name: now for name, now in module._buffers.items() if now is not None and name not in hidden}
    found: dict[str, Tensor] = {}
    for name, tensor in kept.base.buffers.items():
        if tensor is not None and name not in kept.base.hidden:
            now = module._buffers.get(name)
            found[name] = tensor if now is None else _like(tensor, now)
    return found


def _owner(kept: Kept) -> str | None:
    """Return the adapter that gets what moved."""
    active = kept.phase.active
    return kept.shown or next((name for name in active if name in kept.own), active[0] if active else None)


def _is_held(module: nn.Module) -> bool:
    slots = slots_of(module)
    return slots is not None and slots.held


def _is_saved(kept: Kept, name: str) -> bool:
    return kept.base.buffers.get(name) is not None and name not in kept.base.hidden


def _free(module: nn.Module, kept: Kept, names: Iterable[str]) -> list[str]:
    """Return those of the names that are buffers, or none yet, and not exchanged with the module's unfrozen tensors."""
    slots = slots_of(module)
    away: Any = slots.stored(BASE)._buffers if slots is not None and slots.shown is not None else ()
    taken = (module._parameters, module.__dict__, module._modules)
    return [name for name in names if name not in away and not any(name in place for place in taken)]


def _moved(module: nn.Module, kept: Kept) -> Values | None:
    """Return the buffers that are not the base's, with the attributes that go with them, or None."""
    names = dict.fromkeys(kept.base.buffers)
    if kept.built and module._buffers.keys() - names.keys() and kept.built == _built(module):
        names.update(dict.fromkeys(module._buffers))  # else others put them here (pruning, spectral norm)
    elif all(
        now is not None and _same(kept.base.buffers[name], now)
        for name, now in module._buffers.items()
        if name in names
    ):
        return None
    moved: dict[str, Tensor | None] = {}
    for name in _free(module, kept, names):
        base, now = kept.base.buffers.get(name), module._buffers.get(name)
        if base is not None and now is not None:
            base = kept.base.buffers[name] = _like(base, now)
        if not _same(base, now):
            moved[name] = None if now is None else now.detach()
    if not moved:
        return None
    hidden = frozenset(module._non_persistent_buffers_set)
    return Values(moved, hidden, None if kept.base.attributes is None else _attributes(module))


def _put(module: nn.Module, values: Values, names: Iterable[str], copies: dict[int, Tensor] | None) -> None:
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
                value = copies.setdefault(id(value), _copy(value))
            value = value.to(_device(module, value)) if now is None else _like(value, now)
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


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes that a module keeps beside its buffers; containers are copied."""
    found: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in _TORCH or name == KEPT:
            continue
        if type(value) in _PLAIN:
            found[name] = value
        elif type(value) in _CONTAINERS and len(value) <= _MOST_ENTRIES:
            found[name] = copy.copy(value)
    return found


def _put_attributes(module: nn.Module, wanted: dict[str, Any]) -> None:
    """Set a module's plain attributes as they were, in place."""
    now = _attributes(module)
    for name in now.keys() - wanted.keys():
        del module.__dict__[name]
    for name, value in wanted.items():
        if name not in now or not _is_like(now[name], value):
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


def _built(module: nn.Module) -> tuple[Any, ...]:
    """Return what a module is made of, to see whether others rebuilt it."""
    children = tuple(name for name in module._modules if name != SLOT)
    return tuple(module._parameters), children, tuple(module._forward_pre_hooks), tuple(module._forward_hooks)


def _copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone()


def _like(value: Tensor, like: Tensor) -> Tensor:
    """Return a value on the device of another and, if both are floating, in its dtype: the model was converted."""
    if value.is_meta or like.is_meta:
        return like if value.is_meta else value
    floating = value.is_floating_point() and like.is_floating_point()
    return value.to(like.device, like.dtype if floating else value.dtype)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors have the same bits."""
    if one is None or other is None or one is other:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
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


def _mark(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Note in a state_dict's metadata, in place, what the base and the adapters that are not shown have, and who is shown."""
    kept = kept_of(module)
    if kept is not None:
        own = {name: dict(values.buffers) for name, values in kept.own.items() if name != kept.shown}
        local_metadata[SLOT] = {"base": dict(kept.base.buffers), "own": own, "shown": _owner(kept)}


def load_buffers(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
    """Let each buffer that a checkpoint brings find its owner, in place, before torch loads it.

    What a base checkpoint brings is the base's from now on; an adapter that has a buffer of its own keeps it. A checkpoint
    of an adapted model says in its metadata whose its buffers are.
    """
    kept = kept_of(module)
    if kept is None:
        return
    names = _free(module, kept, [name for name in kept.base.buffers if _is_saved(kept, name)])
    stored = f"{prefix}{SLOT}.{STASH}.{BASE}."  # the base's values of an unfrozen module
    away = {name: state_dict[stored + name] for name in kept.base.buffers if stored + name in state_dict}
    brought = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    mark = local_metadata.get(SLOT) or {"base": {}, "own": {}, "shown": None}
    stated = {name: mark["base"][name] for name in brought if mark["base"].get(name) is not None}
    for name, value in {**brought, **stated, **away}.items():
        base = kept.base.buffers[name]
        if isinstance(value, Tensor) and base is not None and value.shape == base.shape:
            kept.base.buffers[name] = _copy(
                value if "assign_to_params_buffers" in local_metadata else _like(value, base)
            )
    own = {name: dict(values) for name, values in mark["own"].items()}
    if stated:
        own[mark["shown"]] = {
            name: brought[name] for name in stated if not _same(_like(stated[name], brought[name]), brought[name])
        }
    elif kept.shown in kept.own:
        own[kept.shown] = {name: module._buffers.get(name) for name in kept.own[kept.shown].buffers}
    here = _owner(kept)
    for name in brought:
        now = own.get(here, {}).get(name)
        state_dict[prefix + name] = stated.get(name, brought[name]) if now is None else now
    for name, values in own.items():
        if name is None or not (values or name in kept.own):
            continue
        kept.phase.own = True
        if name == here:
            kept.own.setdefault(name, Values(hidden=kept.base.hidden))
            kept.shown = name
        else:
            kept.own[name] = Values(values, kept.base.hidden)
