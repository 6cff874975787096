"""Whether the tensors of a base on disk are those that an adapter file was made on: digests, one module at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from pathlib import Path

from torch import Tensor

from ..errors import BaseMismatch, shortened
from .checkpoints import Checkpoint
from .fingerprints import COUNTERS, digest
from .header import AdapterFile

_ORDER = ("weight", "bias", "running_mean", "running_var")  # of the tensors in torch's own modules
_MOST_TRIED = 5  # tensors of one module, in every order


def check_base(checkpoint: Checkpoint, file: AdapterFile, path: Path, prefix: str = "") -> None:
    """Raise if a base on disk is not the one that an adapter file was made on.

    Args:
        checkpoint: the base.
        file: what the adapter file says.
        path: of the adapter file.
        prefix: of the base's keys, where the adapter was put into a part of it.

    Raises:
        BaseMismatch: its ``layers`` are those that differ.
    """
    differ = differing_on_disk(checkpoint, file, prefix)
    if differ:
        raise BaseMismatch(
            f"{path} was made on another base than {checkpoint.path}: {len(differ)} of {len(file.base)} layers differ "
            f"({shortened(differ)}). Give the base that it was trained on; any_base=True (--any-base) takes this one as it is.",
            differ,
        )


def differing_on_disk(checkpoint: Checkpoint, file: AdapterFile, prefix: str = "") -> list[str]:
    """Return the layers of a base on disk that are not those of an adapter file.

    A layer that only the base on disk has is no difference if it is a copy of one that the file knows: a module with two
    names has the keys of both in a state_dict.
    """
    modules, known = checkpoint.modules(prefix), set(file.base.values())
    found = [key for key in file.base if key not in modules]
    for module, names in modules.items():
        place = f"{prefix}{module}." if module else prefix
        here = {name: checkpoint.read(place + name) for name in names if name not in COUNTERS}
        if not here:
            continue
        if module in file.base:
            if not any(each == file.base[module] for each in _digests(here)) and not _is_alike(here, file, module):
                found.append(module)
        elif not any(each in known for each in _digests(here)):
            found.append(module)
    return found


def _digests(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Yield the digests of a module's tensors, in the likeliest order first: files do not keep the module's own."""
    rank = {name: number for number, name in enumerate(_ORDER)}
    usual = sorted(tensors, key=lambda name: (rank.get(name, len(rank)), name))
    tried: set[Sequence[str]] = set()
    orders: Iterable[Sequence[str]] = permutations(usual) if len(tensors) <= _MOST_TRIED else [usual, list(tensors)]
    for order in map(tuple, orders):
        if order not in tried:
            tried.add(order)
            yield digest((name, tensors[name]) for name in order)


def _is_alike(here: dict[str, Tensor], file: AdapterFile, module: str) -> bool:
    """Return whether a module is the one of a file up to buffers that only one of the two has."""
    there = file.parts.get(module)
    if there is None:
        return False
    buffers = [name for name in here if name in there]
    own = {name: tensor for name, tensor in here.items() if name not in there}
    alike = all(digest([(name, here[name])]) == there[name] for name in buffers)
    return alike and (any(each == there[""] for each in _digests(own)) if own else not there[""])
