"""Compare models by their tensors: bit for bit, or relative to the largest value."""

from __future__ import annotations

from typing import Any

from torch import Tensor, equal, nn
from torch.utils._pytree import tree_flatten


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state_dict, in order."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Return whether two state_dicts have the same keys in the same order, with the same dtypes and values."""
    return list(before) == list(after) and all(
        before[key].dtype == after[key].dtype and equal(before[key], after[key]) for key in before
    )


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Raise where two tensors differ by more than ``tolerance`` times the largest expected value."""
    assert actual.shape == expected.shape
    difference, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert difference <= tolerance * scale, f"largest difference {difference:.3g} at scale {scale:.3g}"


def tensors(outputs: Any) -> list[Tensor]:
    """Return all tensors in what a model returned, in order."""
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Raise where two lists of tensors differ in any bit."""
    assert len(actual) == len(expected) > 0, f"{len(actual)} outputs, {len(expected)} expected"
    for number, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert left.dtype == right.dtype, f"output {number} is {left.dtype}, expected {right.dtype}"
        assert equal(left, right), f"output {number} differs"


def changed(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Raise unless each output is finite and differs from the expected one by far more than rounding."""
    for left, right in zip(actual, expected, strict=True):
        assert left.isfinite().all(), "an output is not finite"
        assert (left - right).abs().max() > 1e-6 * right.abs().max(), "the adapters change nothing"
