"""Unfrozen tensors: each adapter that unfroze a module has its own values, exchanged with the base's by reference."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import StateError, shortened
from .buffers import saved_buffers
from .journal import Journal
from .slots import BASE, STASH, Slots, StoredTensors, base_class, slots_of

_UNDO = "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations, remove_weight_norm)"
Owners = Mapping[str, tuple[nn.Module, str | None]]  # by module name: the module, and whose values it is to show


def tensors_of(module: nn.Module, owner: str) -> dict[str, Tensor]:
    """Return an owner's tensors by name (``BASE`` for the base's), wherever they are now."""
    slots = slots_of(module)
    tensors: dict[str, Tensor | None]
    if slots is None or (owner == BASE and slots.shown is None):
        tensors = {**module._parameters, **saved_buffers(module)}
    elif slots.shown == owner:
        exchanged = slots.stored(BASE)._buffers
        tensors = {**module._parameters, **{name: now for name, now in module._buffers.items() if name in exchanged}}
    else:
        store = slots.stored(owner)
        tensors = {**store._parameters, **store._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def swap_in(module: nn.Module, owner: str | None, journal: Journal | None = None) -> None:
    """Exchange the module's tensors by reference so that it shows ``owner``'s values (None: the base's), in place.

    All of them or none: what is displaced is noted in the journal, or, without one, put back if anything is raised.
    """
    slots = slots_of(module)
    if slots is None or slots.shown == owner:
        return
    notes = Journal() if journal is None else journal
    try:
        notes.keep_tensors(module, slots)
        _show(module, slots, owner)
    except BaseException:
        if journal is None:
            notes.undo()
        raise


def _show(module: nn.Module, slots: Slots, owner: str | None) -> None:
    if slots.shown is not None:
        _exchange(module, slots.stored(BASE), slots.stored(slots.shown))
        del slots._modules[STASH]._modules[BASE]  # type: ignore[union-attr]
    if owner is not None:
        _exchange(module, slots.stored(owner), slots.stored(BASE))
    slots.shown = owner


def keep_shown(module: nn.Module) -> None:
    """Make the values shown now the module's only ones, in place: every other owner's, and the base's, are dropped."""
    slots = slots_of(module)
    if slots is not None and slots.owners:
        slots.owners, slots.shown, slots.followers = (), None, ()
        del slots._modules[STASH]


def remove_owner(module: nn.Module, owner: str) -> None:
    """Forget an owner's values, in place; the base's come back if the owner's were shown."""
    slots = slots_of(module)
    if slots is None or owner not in slots.owners:
        return
    if slots.shown == owner:
        swap_in(module, None)
    slots.drop_stored(owner)


def _exchange(module: nn.Module, source: StoredTensors, target: StoredTensors) -> None:
    """Move the tensors in ``source`` into the module, and those they displace into ``target``."""
    for kind in ("_parameters", "_buffers"):
        incoming, place, outgoing = getattr(source, kind), getattr(module, kind), getattr(target, kind)
        for name in list(incoming):
            outgoing[name] = place[name]
            place[name] = incoming[name]
            del incoming[name]


def check_exchange(root: nn.Module, owners: Owners) -> None:
    """Raise if the tensors of some module cannot be exchanged for those of its owner to be.

    Raises:
        StateError: if a tensor to be exchanged is no longer in its module, or FSDP2 holds it.
    """
    check_tensors_present(owners)
    exchanged = [name for name, (module, owner) in owners.items() if _exchanged(module, owner)]
    if exchanged and _is_sharded(root):
        raise StateError(
            f"this {base_class(root).__name__} is sharded by FSDP2, which puts back every tensor that it holds: the "
            f"unfrozen tensors of {shortened(exchanged)} cannot be exchanged. Switch before fully_shard, or save the adapter "
            "and switch in a model that is not sharded; the model is unchanged."
        )


def check_tensors_present(owners: Owners) -> None:
    """Raise if a tensor that showing the owners' values would exchange is no longer in its module.

    Raises:
        StateError: naming the first module and what it lost.
    """
    for name, (module, owner) in owners.items():
        names = _exchanged(module, owner)
        gone = [each for each in names if each not in module._parameters and each not in module._buffers]
        if gone:
            raise StateError(
                f"{name!r} has lost its {', '.join(gone)}: it was pruned, parametrised or weight-normed after inject(), and an "
                f"adapter that unfroze it has values of its own for that. Undo it first {_UNDO}; the model is unchanged."
            )


def _exchanged(module: nn.Module, owner: str | None) -> list[str]:
    """Return the names of the tensors that showing ``owner``'s values would exchange."""
    slots = slots_of(module)
    if slots is None or slots.shown == owner:
        return []
    stores = [slots.stored(BASE if each == slots.shown else each) for each in (slots.shown, owner) if each]
    return list(dict.fromkeys(name for store in stores for name in (*store._parameters, *store._buffers)))


def _is_sharded(root: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(base.__name__ == "FSDPModule" for module in root.modules() for base in type(module).__mro__)
