"""Loading a state_dict into an adapted module: each value to its owner, and no missing adapter passed over in silence.

A checkpoint without a tensor of any adapter is a base checkpoint: adapters stay as they are, and nothing is missing. In any
other, what is missing is missing. A module sees its own part of a checkpoint only, so what it lacks is noted until some
module of the same load meets a tensor of an adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .slots import BASE, SLOT, STASH, Slots
from .unfrozen import tensors_of


class Load(NamedTuple):
    """What torch passes to every module of one call of ``load_state_dict``: how to load, and the lists of complaints."""

    metadata: dict[str, Any]
    missing: list[str]
    unexpected: list[str]
    errors: list[str]


class _Noted(threading.local):
    """What this thread's load, known by its list of missing keys, has met.

    Attributes:
        load: the list.
        adapted: the checkpoint has tensors of an adapter.
        lacking: keys of adapters that are missing if it has.
    """

    load: list[str] | None = None
    adapted = False
    lacking: list[str] = []  # noqa: RUF012  # replaced with each load

    def of(self, load: list[str]) -> _Noted:
        if self.load is not load:
            self.load, self.adapted, self.lacking = load, False, []
        return self


_noted = _Noted()


def note_adapted(missing: list[str]) -> None:
    """Note that the checkpoint has tensors of adapters: all that modules lacked so far is ``missing``, in place."""
    noted = _noted.of(missing)
    noted.adapted = True
    missing += noted.lacking
    noted.lacking = []


def note_lacking(missing: list[str], keys: Iterable[str]) -> None:
    """Note keys of adapters that a module does not find: ``missing``, in place, unless it is a base checkpoint."""
    noted = _noted.of(missing)
    (missing if noted.adapted else noted.lacking).extend(keys)


def split_off(module: nn.Module, slots: Slots, state_dict: dict, prefix: str, load: Load) -> dict[str, Tensor]:
    """Take what belongs to a module's slots out of its part of a checkpoint, in place, and return it.

    Args:
        module: that the checkpoint is loaded into.
        slots: of the module.
        state_dict: torch's private copy for this call; its plain entries are those of the owner that is shown, afterwards.
        prefix: of the module's entries in it.
        load: takes what is wrong.
    """
    below = f"{prefix}{SLOT}."
    if any(key.startswith(below) for key in state_dict):
        note_adapted(load.missing)
    if slots.owners:
        _route(module, slots, state_dict, prefix, load)
    return {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(below)}


def load_slots(slots: Slots, entries: dict[str, Tensor], prefix: str, load: Load) -> None:
    """Load what was split off into a module's slots, in place; an adapter without any entry stays as it is.

    Args:
        slots: of the module.
        entries: by their whole keys.
        prefix: of the module's entries.
        load: takes what is wrong.
    """
    at = f"{prefix}{SLOT}."
    for name, child in slots.adapters():
        inside = f"{at}{name}."
        if not any(key.startswith(inside) for key in entries):
            note_lacking(load.missing, [inside + key for key in child.state_dict(keep_vars=True)])
            entries = {**entries, **{inside + key: value for key, value in child.state_dict(keep_vars=True).items()}}
    _load_tree(slots, entries, at, load)


def _load_tree(module: Any, entries: dict[str, Tensor], prefix: str, load: Load) -> None:
    """Load entries into a module and all below it, in place, as ``load_state_dict`` does."""
    metadata = {**load.metadata, "version": module._version}
    module._load_from_state_dict(entries, prefix, metadata, True, load.missing, load.unexpected, load.errors)
    for name, child in module._modules.items():
        if child is not None:
            inside = f"{prefix}{name}."
            _load_tree(child, {key: v for key, v in entries.items() if key.startswith(inside)}, inside, load)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, _IncompatibleKeys(load.missing, load.unexpected))


def _route(module: nn.Module, slots: Slots, state_dict: dict, prefix: str, load: Load) -> None:
    """Rewrite a checkpoint's entries for a module with owners, in place, so that each value finds its owner.

    A base checkpoint goes to the base, wherever the base's values are now, and to the owners that follow it; a checkpoint
    that was saved while another adapter was active is sorted by owner; where nothing tells whose the plain entries are,
    that is one of the errors torch will raise.
    """
    shown = slots.shown or BASE
    tensors = {owner: tensors_of(module, owner) for owner in (BASE, *slots.owners)}
    owners, names = list(tensors), list(tensors[shown])
    stash = f"{prefix}{SLOT}.{STASH}."
    present = {key[len(stash) :].split(".", 1)[0] for key in state_dict if key.startswith(stash)}
    if not present:
        stated = {BASE: prefix}
        note_lacking(load.missing, [f"{stash}{each}.{n}" for each in owners if each != shown for n in tensors[each]])
    else:
        absent = [owner for owner in owners if owner not in present]
        stated = {owner: f"{stash}{owner}." for owner in owners if owner in present}
        if len(absent) == 1:
            stated[absent[0]] = prefix
        elif absent:
            stated = {}
            load.errors.append(
                f"{prefix.removesuffix('.') or '(root)'}: the checkpoint was saved with other adapters than "
                f"{', '.join(map(repr, owners[1:]))}, so nothing tells whose its plain entries are. Resume with the "
                "adapters it was saved with, or use convpeft.save_adapter and convpeft.load_adapter."
            )
    values = {owner: {n: state_dict.pop(at + n) for n in names if at + n in state_dict} for owner, at in stated.items()}
    for owner in slots.followers:
        if owner not in values and BASE in values:
            values[owner] = _followed(tensors[owner], tensors[BASE], values[BASE])
    for owner in owners:
        at = prefix if owner == shown else f"{stash}{owner}."
        for name, value in (values.pop(owner) if owner in values else tensors[owner]).items():
            state_dict[at + name] = value


def _followed(own: Mapping[str, Tensor], base: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return an owner's values after the base's became ``new``: those that were the base's are a copy of the new ones."""
    follow = {name: name in new and name in base and _same(tensor, base[name]) for name, tensor in own.items()}
    return {name: new[name].clone() if follow[name] else tensor for name, tensor in own.items()}


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same numbers; on the meta device, where there are none, they have."""
    if tensor.shape != other.shape or tensor.dtype != other.dtype or tensor.device != other.device:
        return False
    if tensor.is_meta:
        return True
    return bool(torch.equal(tensor, other) or (tensor.eq(other) | (tensor.ne(tensor) & other.ne(other))).all())
