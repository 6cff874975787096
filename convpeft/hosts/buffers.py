"""Buffers that move while adapters train: what they become belongs to the adapter, and the base's own values come back.

A frozen model still moves: losses count, spectral norm iterates, codebooks and centres follow the data, grids are made at
the first pass. Each of the user's modules that has buffers, or may make some, remembers those of the base, and each
adapter's own, in one attribute of the module, so that copies carry them along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .journal import Journal
from .kept import (
    Kept,
    Values,
    as_here,
    attributes_of,
    copied,
    free_names,
    is_held,
    is_norm_like,
    is_saved,
    kept_of,
    moved_in,
    owner_of,
    parts_of,
    put_in,
    same_bits,
    users_modules,
)
from .records import Names, Phase
from .slots import BASE, KEPT, SLOT, STASH, base_class, slots_of


def note_buffers(root: nn.Module, phase: Phase, journal: Journal) -> None:
    """Note in the journal all that showing others' buffers, or dropping them, would change."""
    journal.keep(phase.__dict__)
    for module in users_modules(root):
        kept = kept_of(module)
        if kept is not None:
            hooks = (module._state_dict_hooks, module._load_state_dict_pre_hooks)
            journal.keep(module.__dict__, module._buffers, module._non_persistent_buffers_set, *hooks)
            journal.keep(kept.__dict__, kept.own)


def remember(modules: Iterable[nn.Module], phase: Phase, journal: Journal) -> None:
    """Let each of the user's modules that has buffers, or may make some, remember those of the base, in place.

    What a module remembers already stays. Classes of torch make no buffers later and keep nothing beside them.

    Args:
        modules: of the model.
        phase: of the model.
        journal: takes what is changed.
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
            journal.keep(module.__dict__, module._state_dict_hooks, module._load_state_dict_pre_hooks)
            if is_torchs:
                module.__dict__[KEPT] = Kept(phase, Values(base, hidden))
            else:
                module.__dict__[KEPT] = Kept(phase, Values(base, hidden, attributes_of(module)), built=parts_of(module))
            if base and not is_norm_like(base):  # norms are held, and have a class of ours
                module._register_state_dict_hook(_mark)
                module._register_load_state_dict_pre_hook(_on_load, with_module=True)


def forget(modules: Iterable[nn.Module]) -> None:
    """Drop what modules remember of their buffers, in place; what they show now is all there is."""
    for module in modules:
        if module.__dict__.pop(KEPT, None) is None:
            continue
        for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_on_load, _mark)]:
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
        if kept is None or not (kept.base.buffers or module._buffers or kept.own):
            continue
        if kept.shown is not None or kept.between or (held if is_held(module) else phase.trained):
            _put_away(module, kept, copies)
        if kept.own:
            owned.append(module)
    phase.trained = trains
    return owned


def _put_away(module: nn.Module, kept: Kept, copies: dict[int, Tensor]) -> None:
    """Put the base's buffers back into one module, in place; if that is interrupted, it can be done again."""
    moved = kept.own.get(kept.shown or "") if kept.between else None
    if moved is None:
        moved, owner = moved_in(module, kept), owner_of(kept)
        if owner is not None and (moved or kept.shown == owner):
            kept.own[owner] = moved or Values()
            kept.shown, kept.phase.own = owner, True
    kept.between = True
    if moved is not None:
        put_in(module, kept.base, free_names(module, kept, moved.buffers), copies)
    kept.shown, kept.between = None, False


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
            kept.between, kept.shown = True, owner
            put_in(module, values, free_names(module, kept, values.buffers), None)
            kept.between = False
    phase.active, phase.own = names, bool(modules)


def weights_stamp(modules: Iterable[nn.Module], names: Names) -> tuple[int, int]:
    """Return a number for the adapters' weights that changes when an optimizer steps, and whose weights these are."""
    first, count = 0, 0
    for module in modules:
        slots = slots_of(module)
        for name in names if slots is not None else ():
            own: Any = slots._modules.get(name) or (module if slots.shown == name else None)  # type: ignore[union-attr]
            if own is None:
                continue
            weight = next(iter(own._parameters.values()), None) if own._parameters else next(own.parameters(), None)
            if weight is not None and not weight.is_inference():
                first, count = first or id(weight), count + weight._version
    return first, count


def own_buffers(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """Yield each module with the buffers that an adapter has of its own and a state_dict can bring back, by name.

    A buffer that the base does not have is not among them: the module made it, and makes it again.
    """
    for module in users_modules(root):
        kept = kept_of(module)
        if kept is None or not kept.base.buffers:
            continue
        if kept.shown == name or (kept.phase.trained and owner_of(kept) == name and not is_held(module)):
            values = moved_in(module, kept)
        else:
            values = kept.own.get(name)
        found = {} if values is None else values.buffers
        tensors = {key: tensor for key, tensor in found.items() if tensor is not None and is_saved(kept, key)}
        if tensors:
            yield module, tensors


def give(module: nn.Module, name: str, buffers: dict[str, Tensor], journal: Journal) -> None:
    """Let an adapter have its own buffers of a module, in place; they are not shown yet."""
    kept = kept_of(module)
    if kept is not None:
        journal.keep(kept.own, kept.phase.__dict__)
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
        for name in free_names(module, kept, kept.base.buffers):
            now = module._buffers.get(name)
            kept.base.buffers[name] = None if now is None else copied(now)


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
            found[name] = tensor if now is None else as_here(tensor, now)
    return found


def _mark(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Note in a state_dict's metadata, in place, what the base and the adapters that are not shown have, and who is shown."""
    kept = kept_of(module)
    if kept is not None:
        own = {name: dict(values.buffers) for name, values in kept.own.items() if name != kept.shown}
        local_metadata[SLOT] = {"base": dict(kept.base.buffers), "own": own, "shown": owner_of(kept)}


def _on_load(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict[str, Any], *_: Any) -> None:
    if slots_of(module) is None:  # else the module's class asks for it
        load_buffers(module, state_dict, prefix, local_metadata)


def load_buffers(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict[str, Any]) -> None:
    """Let each buffer that a checkpoint brings find its owner, in place, before torch loads it.

    What a base checkpoint brings is the base's from now on; an adapter that has a buffer of its own keeps it. A checkpoint
    of an adapted model says in its metadata whose its buffers are.
    """
    kept = kept_of(module)
    if kept is None:
        return
    names = free_names(module, kept, [name for name in kept.base.buffers if is_saved(kept, name)])
    stored = f"{prefix}{SLOT}.{STASH}.{BASE}."  # the base's values of an unfrozen module
    away = {name: state_dict[stored + name] for name in kept.base.buffers if stored + name in state_dict}
    brought = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
    mark = local_metadata.get(SLOT) or {"base": {}, "own": {}, "shown": None}
    stated = {name: mark["base"][name] for name in brought if mark["base"].get(name) is not None}
    for name, value in {**brought, **stated, **away}.items():
        base = kept.base.buffers[name]
        if isinstance(value, Tensor) and base is not None and value.shape == base.shape:
            kept.base.buffers[name] = copied(
                value if "assign_to_params_buffers" in local_metadata else as_here(value, base)
            )
    own = {name: dict(values) for name, values in mark["own"].items()}
    if stated:
        own[mark["shown"]] = {
            name: brought[name] for name in stated if not same_bits(as_here(stated[name], brought[name]), brought[name])
        }
    elif kept.shown in kept.own:
        own[kept.shown] = {name: module._buffers.get(name) for name in kept.own[kept.shown].buffers}
    here = owner_of(kept)
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
