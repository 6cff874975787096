"""Adapters that stay in a merged model: fold what is linear inside them, after the same probe a merge has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import hosting
from .adapters.base import Adapter
from .copying import copied
from .errors import MergeError
from .geometry import random_input
from .merge_forms import TOLERANCE, Job


@dataclass(frozen=True)
class Fold:
    """One adapter that stays.

    Attributes:
        adapter: as it is in the model.
        folded: the same function with its linear parts folded, in the adapter's own dtype; None if it must stay as it is.
        what: was folded, in words, or why nothing is.
    """

    adapter: Adapter
    folded: Adapter | None
    what: str


def fold_parts(job: Job) -> tuple[Fold, ...]:
    """Return the folded forms of a layer's active adapters, probed; the layer is not touched."""
    found: list[Fold] = []
    for adapter in job.adapters:
        what = adapter.foldable()
        if what is not None:
            found.append(_fold(adapter, what))
    return tuple(found)


def put_folds(layer: nn.Module, folds: Sequence[Fold]) -> None:
    """Put folded adapters in the place of their originals, in place."""
    slots = hosting.slots_of(layer)
    assert slots is not None
    for name, adapter in list(slots.adapters()):
        for fold in folds:
            if fold.adapter is adapter and fold.folded is not None:
                slots[name] = fold.folded


def _fold(adapter: Adapter, what: str) -> Fold:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in adapter.state_dict().values()):
        return Fold(adapter, None, "it is not folded: it has non-finite weights")
    device, dtype = hosting.device_and_dtype([adapter])
    folded = adapter.folded()
    try:
        _probe(adapter, folded)
    except MergeError as error:
        return Fold(adapter, None, f"it is not folded: {error}")
    folded = folded.to(device=device, dtype=dtype)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in folded.state_dict().values()):
        return Fold(adapter, None, f"it is not folded: its folded weights overflow {dtype}")
    return Fold(adapter, folded, what)


def _probe(adapter: Adapter, folded: Adapter) -> None:
    """Raise a MergeError if the two differ by more than rounding on a random input larger than every kernel."""
    size = 3 + max(
        (side for tensor in adapter.parameters() if tensor.ndim == 4 for side in tensor.shape[2:]), default=1
    )
    x = random_input(adapter.site.geometry, size, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = (copied(one).to(device="cpu", dtype=torch.float64).eval()(x) for one in (adapter, folded))
    difference, scale = float((expected - got).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:
        raise MergeError(
            f"folded it does not compute what it did: largest output {scale:.6g}, largest difference {difference:.3g}, "
            f"allowed {TOLERANCE * scale:.1g}"
        )
