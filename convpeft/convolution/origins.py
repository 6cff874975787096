"""What need not be kept for backward, because a few elementwise operations make it again from what is kept already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.4 or so


class Origin(NamedTuple):
    """How to make a tensor again.

    Attributes:
        source: what autograd keeps anyway.
        remake: gives the tensor, bit for bit.
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


# activations whose node keeps its input; those that keep their output (ReLU, Sigmoid) share it with the next layer
_ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: F.silu,
    "HardswishBackward0": lambda node: F.hardswish,
    "MishBackward0": lambda node: F.mish,
    "GeluBackward0": _gelu,
    "LeakyReluBackward0": _leaky_relu,
    "HardtanhBackward0": _clamped,
}


def origin_of(x: Tensor) -> Origin | None:
    """Return how to make ``x`` again from what its activation keeps, or None where it must be kept itself.

    The graph tells: the node that made ``x`` is the activation's and holds that one's input. Nothing is asked of the
    activation module, so functional ones and shared ones are found as well. None as well for a tensor that was written
    to since, and while a checkpoint records (looking at what a node keeps would make it compute anew).
    """
    node = x.grad_fn
    if node is None or x._is_view():
        return None
    activation = _ACTIVATIONS.get(type(node).__name__)
    if activation is None or not _may_look():
        return None
    try:
        source: Tensor = node._saved_self  # type: ignore[attr-defined]
    except RuntimeError:  # written to since
        return None
    own = (
        1 if type(source.grad_fn).__name__ == "CloneBackward0" else 0
    )  # an activation in place kept a copy of its input
    if x._version > own or source.shape != x.shape:
        return None
    return Origin(source, activation(node))


def _may_look() -> bool:
    """Whether a node may be asked for what it keeps without setting off somebody's hooks for saved tensors."""
    if _HOOKS is None:
        return False
    hooks = _HOOKS(False)
    return hooks is None or not any(
        getattr(hook, "__module__", "") in ("torch.utils.checkpoint", "torch.autograd.graph") for hook in hooks
    )
