"""Depthwise branches of the Rep-MoNA, MoNA and mixture-of-experts kinds, and small helpers that kinds share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..convolution.geometry import ConvGeometry, Pair
from ..convolution.kernels import embed_on_grid
from .base import exact


class Branch(nn.Module):
    """One depthwise convolution, with a bias or a BatchNorm if asked for.

    Args:
        geometry: of the convolution, depthwise: as many groups as channels.
        norm: add a BatchNorm after the convolution; its statistics belong to the adapter and are folded in a merge. It is
            torch's own, for ``SyncBatchNorm.convert_sync_batchnorm`` has to find it.
        bias: add a bias to the convolution.
    """

    def __init__(self, geometry: ConvGeometry, *, norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.geometry = geometry
        self.weight = nn.Parameter(torch.empty(geometry.weight_shape()))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(geometry.out_channels)) if bias else None
        self.norm: Any = nn.BatchNorm2d(geometry.out_channels) if norm else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the branch's output, ``(N, rank, H', W')``, or ``(rank, H', W')`` for an input without a batch."""
        maps = self.geometry.convolve(hidden, self.weight, self.bias)
        if isinstance(self.norm, nn.BatchNorm2d):
            follow_weight(self.norm)
        if maps.__class__ is Tensor and maps.ndim == 3 and not isinstance(self.norm, nn.Identity):  # no batch
            return self.norm(maps.unsqueeze(0)).squeeze(0)
        return self.norm(maps)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Return the weight and bias in float64, with the norm's running statistics folded in."""
        weight = exact(self.weight)
        bias = weight.new_zeros(weight.shape[0]) if self.bias is None else exact(self.bias)
        if isinstance(self.norm, nn.Identity):
            return weight, bias
        gain = exact(self.norm.weight) / (exact(self.norm.running_var) + self.norm.eps).sqrt()
        shift = exact(self.norm.bias) + (bias - exact(self.norm.running_mean)) * gain
        return weight * gain.view(-1, 1, 1, 1), shift


def follow_weight(norm: nn.BatchNorm2d) -> None:
    """Bring a norm's running statistics to the dtype of its weight, in place; torch refuses some mixtures of the two."""
    mean, variance, dtype = norm.running_mean, norm.running_var, norm.weight.dtype
    if mean is not None and variance is not None and mean.dtype != dtype:
        norm.running_mean, norm.running_var = mean.to(dtype), variance.to(dtype)


def sum_of_kernels(branches: Iterable[Branch], host_size: Pair, size: Pair) -> Tensor:
    """Return one depthwise kernel, ``(rank, 1, *size)``, whose convolution equals the sum of the branches.

    Args:
        branches: without norms; their biases are not included.
        host_size: the host's kernel size: the branches are centred on it.
        size: kernel size of the result.
    """
    return reduce(torch.add, [embed_on_grid(branch.weight, host_size, size) for branch in branches])


def is_traced(x: Any) -> bool:
    """Return whether ``x`` is being traced or not a plain tensor: the size of a computed kernel is then unknown."""
    return x.__class__ is not Tensor or torch.jit.is_tracing()


def shared_rank(host: ConvGeometry, rank: int) -> int:
    """Return the hidden channels of an update of this rank; groups divide it among them, at least 1 each."""
    if host.groups == 1:
        return rank
    return host.groups * max(1, min(rank // host.groups, host.out_per_group))


def zeroed(layer: Any) -> Any:
    """Set a layer's weight and bias to zero, in place, and return the layer."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
