"""LoRA for convolutions and linear layers, beside a layer or on a module's output.

Papers: Hu et al., LoRA, arXiv:2106.09685; Kalajdzievski, rsLoRA, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import Chain, ConvKernel
from ..registry import register_adapter
from .base import Adapter, AdapterOptions, Site, exact, positive, probability


@dataclass(frozen=True)
class LoraOptions(AdapterOptions):
    """Options of ``lora``.

    Attributes:
        rank: r, the width of the detour. A grouped layer shares it out: ``max(1, rank // groups)`` for each group.
        alpha: the update is scaled by ``alpha / rank``; unset means ``alpha = rank``, a scale of 1.
        dropout: of the detour's input, in training.
        rslora: scale by ``alpha / sqrt(rank)`` instead.
        pointwise: A looks at the centre pixel only (1x1) instead of the layer's whole kernel.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    pointwise: bool = False

    def problems(self) -> Iterator[str]:
        """Yield what is out of range."""
        yield from positive(self, "rank", "alpha")
        yield from probability(self, "dropout")


@register_adapter("lora")
class Lora(Adapter):
    """``f(x) = (alpha / r) * B(A x)``: A has the layer's kernel, stride and padding, B is 1x1 and starts at zero.

    Groups stay groups: both factors are block-diagonal, nothing leaks from one group to another, and a depthwise
    layer's adapter is no larger than the layer. On a module's output A and B are 1x1 convolutions over its channels.

    Reference: arXiv:2106.09685, eq. 3: ``W' = W + (alpha / r) B A``.
    """

    places = ("parallel", "output")
    Options = LoraOptions

    def __init__(self, site: Site, options: LoraOptions) -> None:
        super().__init__(site, options)
        host = site.geometry
        per_group = options.rank if host.groups == 1 else max(1, min(options.rank // host.groups, host.out_per_group))
        rank = per_group * host.groups
        inner = host.resized((1, 1)) if options.pointwise else host
        self.down_geometry = inner.with_channels(host.in_channels, rank)
        self.up_geometry = host.pointwise(rank, host.out_channels, host.groups)
        alpha = options.rank if options.alpha is None else options.alpha
        self.scale = alpha / (math.sqrt(options.rank) if options.rslora else options.rank)
        self.down = nn.Parameter(torch.empty(self.down_geometry.weight_shape()))
        self.up = nn.Parameter(torch.zeros(self.up_geometry.weight_shape()))
        self.dropout = nn.Dropout(options.dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update, shaped like the host's output."""
        hidden = self.down_geometry.convolve(self.dropout(x), self.down)
        return self.up_geometry.convolve(hidden, self.up) * self.scale

    def chain(self) -> Chain:
        """Return A, then the scaled B."""
        return (
            ConvKernel(exact(self.down), None, self.down_geometry),
            ConvKernel(exact(self.up) * self.scale, None, self.up_geometry),
        )
