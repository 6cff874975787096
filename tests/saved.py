"""What a forward pass keeps for the backward pass, counted and not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def kept(model: Callable[[Tensor], Tensor], x: Tensor, known: Iterable[Tensor] = ()) -> list[Tensor]:
    """Return what autograd keeps for backward, each storage once; parameters, buffers and what is known left out."""
    own = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*own, *known)}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return list(found.values())


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of all storages autograd saves in ``function(x)``, each once, the parameters' own left out."""
    return sum(tensor.untyped_storage().nbytes() for tensor in kept(lambda x: function(x), x, parameters))
