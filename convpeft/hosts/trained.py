"""Which adapters train: their parameters require gradients, and their values of what they unfroze."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .journal import Journal, all_parameters


def train_only(adapted: Any, names: Iterable[str], journal: Journal) -> None:
    """Let exactly the named adapters require gradients, in place: their parameters and their unfrozen tensors.

    Adapters that neither were nor are to be trained are not looked at.

    Args:
        adapted: the ``AdaptedModel``.
        names: of adapters.
        journal: takes what is changed.
    """
    state = adapted.state
    journal.keep(state.__dict__)
    wanted = tuple(name for name in names if name in state.adapters)
    changed = dict.fromkeys(name for name in (*state.trained, *wanted) if name in state.adapters)
    state.trained = wanted
    for name in changed:
        flag = name in wanted
        for _, adapter in adapted.adapters(name):
            for parameter in all_parameters(adapter):
                journal.require_grad(parameter, flag)
        for _, tensors in adapted.unfrozen(name):
            for tensor in tensors.values():
                if isinstance(tensor, nn.Parameter):
                    journal.require_grad(tensor, flag)
