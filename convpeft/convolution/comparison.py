"""Two results that should be the same, compared: by how much they differ, next to how large they are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TOLERANCE = 1e-12  # relative to the largest value, in float64: what rounding does to one layer


class Difference(NamedTuple):
    """How far two tensors are apart.

    Attributes:
        largest: absolute value of the expected tensor.
        difference: the largest absolute one; infinite for different shapes.
        allowed: for rounding.
    """

    largest: float
    difference: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than rounding; never for values that are not finite."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return (
            f"largest output {self.largest:.6g}, largest difference {self.difference:.3g}, allowed {self.allowed:.1g}"
        )


def compare(expected: Tensor, got: Tensor, tolerance: float = TOLERANCE) -> Difference:
    """Return how far ``got`` is from ``expected``.

    Args:
        expected: any shape, in float64.
        got: to be the same.
        tolerance: allowed, relative to the largest expected value.

    Example:
        >>> import torch
        >>> compare(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])).is_rounding
        False
    """
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    if expected.shape != got.shape:
        return Difference(largest, float("inf"), tolerance * largest)
    return Difference(largest, float((expected - got).abs().max()) if expected.numel() else 0.0, tolerance * largest)
