"""Whose values the entries of a checkpoint are, for a module of which several owners have values of their own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

SLOT = "convpeft"
STASH = "_stash"
BASE = "_base"


def route_checkpoint(
    tensors: Mapping[str, Mapping[str, Tensor]], shown: str, state_dict: dict, prefix: str, errors: list[str]
) -> None:
    """Rewrite a checkpoint's entries for a module with owners, in place, so that each value finds its owner.

    A base checkpoint goes to the base, wherever the base's values are now; a checkpoint that was saved while another
    adapter was active is sorted by owner; where nothing tells whose the plain entries are, that is one of the ``errors``
    torch will raise.

    Args:
        tensors: the module's tensors by owner, the base first.
        shown: the owner whose values the module shows now.
        state_dict: torch's private copy for this call.
        prefix: of the module's entries in it.
        errors: takes what is wrong.
    """
    owners, names = list(tensors), list(tensors[shown])
    stash = f"{prefix}{SLOT}.{STASH}."
    present = {key[len(stash) :].split(".", 1)[0] for key in state_dict if key.startswith(stash)}
    if not present:
        stated = {BASE: prefix}
    else:
        absent = [owner for owner in owners if owner not in present]
        stated = {owner: f"{stash}{owner}." for owner in owners if owner in present}
        if len(absent) == 1:
            stated[absent[0]] = prefix
        elif absent:
            stated = {}
            errors.append(
                f"{prefix.removesuffix('.') or '(root)'}: the checkpoint was saved with other adapters than "
                f"{', '.join(map(repr, owners[1:]))}, so nothing tells whose its plain entries are. Resume with the "
                "adapters it was saved with, or use convpeft.save_adapter and convpeft.load_adapter."
            )
    values = {owner: {n: state_dict.pop(at + n) for n in names if at + n in state_dict} for owner, at in stated.items()}
    for owner in owners:
        current = tensors[owner]
        at = prefix if owner == shown else f"{stash}{owner}."
        for name, value in (values.pop(owner) if owner in values else current).items():
            state_dict[at + name] = value
