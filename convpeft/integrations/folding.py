"""Fold a norm into the convolution before it, and into the chains that a factored merge left beside that convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapters.base import exact
from ..hosts.chains import beside, chains_of


def may_fold(conv: Any, norm: Any) -> bool:
    """Return whether a norm folds into a convolution with what is beside it: fixed statistics, and no chain in between."""
    return (
        isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and not chains_of(norm)
        and all(chains.beside for chains in chains_of(conv))
        and conv._parameters.get("weight") is not None
    )


def fold(conv: Any, norm: Any) -> None:
    """Fold a norm into a convolution and the chains beside it, in place: ``g (W x + C x) + s``.

    The convolution takes the shift ``s`` into its bias; with chains beside it, the first chain's last step does.
    """
    gain = (exact(norm.running_var) + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * exact(norm.weight)
    shift = -exact(norm.running_mean) * gain
    shift = shift if norm.bias is None else shift + exact(norm.bias)
    chains = beside(conv)
    _scale(conv, gain, shift if chains is None else None)
    for position, chain in enumerate(() if chains is None else chains.held):
        _scale(chain[-1], gain, shift if position == 0 else None)  # type: ignore[index]


def _scale(layer: Any, gain: Tensor, shift: Tensor | None) -> None:
    """Scale a layer's output by a gain for each channel and add a shift, in place."""
    bias = None if layer.bias is None else exact(layer.bias) * gain
    if shift is not None:
        bias = shift if bias is None else bias + shift
    flag = layer.weight.requires_grad
    layer.weight = _parameter(exact(layer.weight) * gain.view(-1, 1, 1, 1), layer.weight, flag)
    if bias is not None:
        layer.bias = _parameter(bias, layer.weight, flag)


def _parameter(value: Tensor, like: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=requires_grad)
