"""A running average of what trains, and of nothing else: the frozen base is not copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """The exponential moving average of some tensors of a model, kept beside them.

    After ``n`` updates the decay is ``min(decay, (1 + n) / (10 + n))``, so that a short run does not average in its start.
    Whole numbers (a norm's counter) are copied.

    Args:
        tensors: the live ones by name; they are read, and written only by ``shown``.
        decay: share of the old average that stays at each update, below 1.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.live = {name: tensor.detach() for name, tensor in tensors.items()}
        self.averages = {name: tensor.clone() for name, tensor in self.live.items()}
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live tensors, in place."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, average in self.averages.items():
            if average.is_floating_point():
                average.lerp_(self.live[name], weight)
            else:
                average.copy_(self.live[name])

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let the model have the averages inside a ``with`` block, and its own values again after it."""
        own = {name: tensor.clone() for name, tensor in self.live.items()}
        self.write(self.averages)
        try:
            yield
        finally:
            self.write(own)

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the live tensors, in place."""
        for name, tensor in self.live.items():
            tensor.copy_(values[name])
