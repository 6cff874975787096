"""Find inputs that need not be saved for backward: they are recomputed from what the activation before saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.4 or so


class Origin(NamedTuple):
    """How to recompute a tensor.

    Attributes:
        source: a tensor that autograd saves anyway.
        remake: recomputes the tensor from ``source``, bit for bit.
    """

    source: Tensor
    remake: Callable[[Tensor], Tensor]


def _gelu(node: Any) -> Callable[[Tensor], Tensor]:
    approximate = node._saved_approximate
    return lambda source: F.gelu(source, approximate=approximate)


def _leaky_relu(node: Any) -> Callable[[Tensor], Tensor]:
    slope = node._saved_negative_slope
    return lambda source: F.leaky_relu(source, slope)


def _clamped(node: Any) -> Callable[[Tensor], Tensor]:
    low, high = node._saved_min_val, node._saved_max_val
    return lambda source: F.hardtanh(source, low, high)


# activations whose node saves its input; those that save their output (ReLU, Sigmoid) share it with the next layer
_ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: F.silu,
    "HardswishBackward0": lambda node: F.hardswish,
    "MishBackward0": lambda node: F.mish,
    "GeluBackward0": _gelu,
    "LeakyReluBackward0": _leaky_relu,
    "HardtanhBackward0": _clamped,
}


def origin_of(x: Tensor) -> Origin | None:
    """Return how to recompute ``x`` from what its activation saved, or None if ``x`` itself must be saved.

    The activation is found by the autograd node that made ``x``, which holds its input; so functional and shared
    activations are found too. None is returned as well for a tensor that was modified in place since, and inside
    ``torch.utils.checkpoint``, where reading a node's saved tensor would trigger the recomputation.
    """
    node = x.grad_fn
    if node is None or x._is_view():
        return None
    activation = _ACTIVATIONS.get(type(node).__name__)
    if activation is None or not _can_read_saved():
        return None
    try:
        source: Tensor = node._saved_self  # type: ignore[attr-defined]
    except RuntimeError:  # modified in place since
        return None
    # an in-place activation saves a clone of its input, and counts as one modification itself
    expected = 1 if type(source.grad_fn).__name__ == "CloneBackward0" else 0
    if x._version > expected or source.shape != x.shape:
        return None
    return Origin(source, activation(node))


def _can_read_saved() -> bool:
    """Return whether saved tensors can be read without running hooks of checkpoints or ``torch.autograd.graph``."""
    if _HOOKS is None:
        return False
    hooked = ("torch.utils.checkpoint", "torch.autograd.graph")
    return not any(getattr(hook, "__module__", "") in hooked for hook in _HOOKS(False) or ())
