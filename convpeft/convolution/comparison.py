"""Compare two tensors that should be equal: their largest difference, relative to their largest value."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TOLERANCE = 1e-12  # relative to the largest value, in float64: the rounding error of one layer


class Difference(NamedTuple):
    """The largest difference of two tensors, and how much of it rounding may explain.

    Attributes:
        largest: the largest absolute value of the expected tensor.
        difference: the largest absolute difference; infinite for different shapes.
        allowed: the largest difference that counts as rounding.
    """

    largest: float
    difference: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is rounding only; False when a value is not finite."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return (
            f"largest output {self.largest:.6g}, largest difference {self.difference:.3g}, allowed {self.allowed:.1g}"
        )


def compare(expected: Tensor, got: Tensor, tolerance: float = TOLERANCE) -> Difference:
    """Return the ``Difference`` between ``expected`` and ``got``.

    Args:
        expected: any shape, in float64.
        got: the tensor to compare; same shape and dtype.
        tolerance: the allowed difference, relative to the largest absolute value of ``expected``.

    Example:
        >>> import torch
        >>> compare(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])).is_rounding
        False
    """
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    if expected.shape != got.shape:
        return Difference(largest, float("inf"), tolerance * largest)
    difference = float((expected - got).abs().max()) if expected.numel() else 0.0
    return Difference(largest, difference, tolerance * largest)
