"""Copies of modules, those with a computed weight included."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def copied(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Return a deep copy, also of a module that keeps a tensor of autograd's graph, which ``copy.deepcopy`` refuses.

    ``weight_norm``, ``spectral_norm`` and ``prune`` of ``torch.nn.utils`` keep the weight of the last pass as a plain
    attribute and compute it anew before each pass; the copy starts with its value, outside the graph.

    Args:
        module: stays as it is.
        memo: of ``copy.deepcopy``: what each object became, by ``id``.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for value in part.__dict__.values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)
