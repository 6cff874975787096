"""Find inputs that need not be saved for backward: they are recomputed from what the activation before saved.

An input is recomputed only where that is proved to give it: ``origin_of`` recomputes it at once and compares the bits.
A tensor can be written to without autograd's knowledge (``.data``, numpy, a kernel of somebody's own), so no version
counter proves it. The comparison costs a pass over the map; docs/decisions/0016 has the figures.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import without_autocast

Remake = Callable[[Tensor], Tensor]


class Origin(NamedTuple):
    """How to recompute a tensor.

    Attributes:
        source: a tensor that autograd saves anyway.
        remake: recomputes the tensor from ``source``, bit for bit.
    """

    source: Tensor
    remake: Remake


def _gelu(node: Any) -> Remake:
    approximate = node._saved_approximate
    return lambda source: F.gelu(source, approximate=approximate)


def _leaky_relu(node: Any) -> Remake:
    slope = node._saved_negative_slope
    return lambda source: F.leaky_relu(source, slope)


def _clamped(node: Any) -> Remake:
    low, high = node._saved_min_val, node._saved_max_val
    return lambda source: F.hardtanh(source, low, high)


# activations whose node saves its input; those that save their output (ReLU, Sigmoid) share it with the next layer
_ACTIVATIONS: dict[str, Callable[[Any], Remake]] = {
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
    activations are found too. The result is proved: ``x`` has just been recomputed, and every bit was the same. So a
    tensor that anybody wrote to since, in whatever way, has no origin.

    Hooks for saved tensors (checkpoints, offloading) are never run: they are for the backward pass, and some can be
    called only once. What one packed is used if it is a tensor that ``x`` can be recomputed from.
    """
    node = x.grad_fn
    if node is None or x._is_view() or x._backward_hooks:
        return None
    activation = _ACTIVATIONS.get(type(node).__name__)
    if activation is None or not _can_compare(x):
        return None
    source = _saved_input(node)
    if source is None or (source.shape, source.dtype, source.device) != (x.shape, x.dtype, x.device):
        return None
    origin = Origin(source, activation(node))
    with torch.no_grad(), without_autocast(x):
        return origin if _same_bits(origin.remake(source.detach()), x.detach()) else None


def _saved_input(node: Any) -> Tensor | None:
    """Return what an activation's node saved, or None if that cannot be read without running hooks for saved tensors."""
    raw = node._raw_saved_self
    unpack = getattr(raw, "unpack_hook", node)  # torch before 2.6 or so does not have it
    if unpack is node:
        return None
    try:
        found = node._saved_self if unpack is None else raw.data
    except RuntimeError:  # modified in place since, or freed
        return None
    return found if type(found) in (Tensor, nn.Parameter) and _leads_to(found, *node.next_functions[0]) else None


def _leads_to(source: Tensor, node: Any, index: int) -> bool:
    """Return whether a tensor is the output ``index`` of an autograd node, or a clone of it, so that gradients go there."""
    own = source.grad_fn
    if own is None:
        return getattr(node, "variable", None) is source
    if own is node:
        return source.output_nr == index
    return type(own).__name__ == "CloneBackward0" and own.next_functions == ((node, index),)


def _can_compare(x: Tensor) -> bool:
    """Return whether the values of ``x`` can be looked at now."""
    if x.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return x.device.type != "meta"


def _same_bits(again: Tensor, x: Tensor) -> bool:
    """Return whether two tensors of one shape are equal; dense ones are compared as whole numbers of eight bytes."""
    if again.dtype != x.dtype or again.shape != x.shape:
        return False
    dense = again.is_contiguous() or again.is_contiguous(memory_format=torch.channels_last)
    whole = all(
        (count * x.element_size()) % 8 == 0 for count in (x.numel(), x.storage_offset(), again.storage_offset())
    )
    if again.stride() != x.stride() or not dense or not whole:
        return torch.equal(again, x)
    return torch.equal(_as_words(again), _as_words(x))


def _as_words(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,)).view(torch.int64)


class Recall:
    """How an autograd node gets its input back in the backward pass, from what it saved.

    Args:
        x: the input.
        origin: of ``x``, or None if ``x`` itself is saved.
    """

    def __init__(self, x: Tensor, origin: Origin | None) -> None:
        self.remake = None if origin is None else origin.remake
        if origin is not None:
            self._x, self._version, self._node = weakref.ref(x), x._version, x.grad_fn

    def input(self, saved: Tensor) -> Tensor:
        """Return the node's input, connected to the graph it came from while gradients are to be differentiated again.

        While somebody holds ``x``, it is connected to ``x``, because a second gradient can be asked for there. Otherwise it
        is connected to the activation's own input: the second gradients of everything before that are the same.
        """
        if self.remake is None:
            return saved
        x = self._x() if torch.is_grad_enabled() else None
        if x is None or x._version != self._version or x.grad_fn is not self._node:
            return self.remake(saved)
        return _Connected.apply(x, self.remake(saved.detach()))  # type: ignore[no-any-return]


class _Connected(torch.autograd.Function):
    """Return given values, of which ``x`` gets the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing: the gradient is passed on as it is."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
