"""Conv-LoRA: LoRA with a mixture of experts in its low-rank space: convolutions at several scales of the map.

Paper: Zhong et al., Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything Model,
arXiv:2401.17868 (ICLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convolution.nodes import convolve_trained
from ..errors import shown
from .base import Site
from .branches import shared_rank
from .gating import RoutedAdapter, Router, weigh_by_group
from .options import MOST_SIZES, AdapterOptions, positive, probability
from .registry import register_adapter

_LARGEST_SCALE = 64  # the map grows by its square in memory


@dataclass(frozen=True)
class ConvLoraOptions(AdapterOptions):
    """Options of ``conv_lora``.

    Attributes:
        rank: r, the hidden channels; a grouped layer gets ``max(1, rank // groups)`` per group.
        alpha: the update is scaled by ``alpha / rank``; unset means ``alpha = rank``, a scale of 1.
        scales: one expert for each: the factor by which it enlarges the hidden map before its 3x3 convolution.
        top_k: number of experts with a nonzero gate for one image.
        pointwise: A is 1x1, at the centre of the layer's kernel, instead of the whole kernel.
        load_balancing: weight of the load-balancing loss; 0 is off.
        dropout: dropout probability on the update's input, in training.
    """

    rank: int = 8
    alpha: float | None = None
    scales: tuple[int, ...] = (1, 2, 4)
    top_k: int = 1
    pointwise: bool = False
    load_balancing: float = 0.0
    dropout: float = 0.0

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "rank", "alpha", "top_k")
        yield from probability(self, "dropout")
        if not self.scales:
            yield "scales must name at least one scale"
        if len(self.scales) > MOST_SIZES:
            yield f"scales must be at most {MOST_SIZES} numbers, not {len(self.scales):,}"
            return
        yield from (
            f"scales must be whole numbers of at least 1 and at most {_LARGEST_SCALE}, not {shown(scale)}"
            for scale in self.scales
            if not 1 <= scale <= _LARGEST_SCALE
        )
        if self.top_k > len(self.scales):
            yield f"top_k {self.top_k} is more than the {len(self.scales)} experts of scales"
        if self.load_balancing < 0:
            yield f"load_balancing must be 0 (off) or above, not {self.load_balancing!r}"


class ScaleExpert(nn.Module):
    """Enlarge a map by a factor, convolve it 3x3, and reduce it to its original size; both resizes are bilinear."""

    def __init__(self, channels: int, groups: int, scale: int) -> None:
        super().__init__()
        self.groups, self.scale = groups, scale
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expert's output, ``(N, rank, H, W)`` like its input."""
        if self.scale == 1:
            return F.conv2d(hidden, self.weight, padding=1, groups=self.groups)
        height, width = hidden.shape[-2:]
        large = F.interpolate(hidden, size=(height * self.scale, width * self.scale), mode="bilinear")
        large = F.conv2d(large, self.weight, padding=1, groups=self.groups)
        return F.interpolate(large, size=(height, width), mode="bilinear")

    def extra_repr(self) -> str:
        """Return the scale, to be shown when the model is printed."""
        return f"scale {self.scale}"


@register_adapter("conv_lora")
class ConvLora(RoutedAdapter):
    """``f(x) = (alpha / r) * B( sum_k g_k(A x) E_k(A x) )``: LoRA's A and B, with gates g and experts E_k between them.

    A has the layer's kernel, stride, dilation and padding, so the experts run on the layer's output grid; B is 1x1 and
    starts at zero, so ``f`` does. ``Router`` computes the gates from the average of ``A x``: top-k of a softmax,
    without the paper's noise. A, B, the experts and the router have the layer's groups, and each group has its own
    gates. All experts run, those not chosen with gate 0: no shape depends on the data, and every parameter has a
    gradient in every step (DDP, ``torch.compile``). The load-balancing loss is that of ``RoutedAdapter``, not the
    paper's squared coefficient of variation of the importance.

    Reference: arXiv:2401.17868, eq. 3-4.
    """

    places = ("parallel",)
    Options = ConvLoraOptions
    merge_refusal = "its gates choose experts for each image, so no convolution equals it"
    image_parts = "experts"

    def __init__(self, site: Site, options: ConvLoraOptions) -> None:
        super().__init__(site, options)
        host = site.geometry
        rank = shared_rank(host, options.rank)
        inner = host.resized((1, 1)) if options.pointwise else host
        self.down_geometry = inner.with_channels(host.in_channels, rank)
        self.up_geometry = host.pointwise(rank, host.out_channels, host.groups)
        self.scale = 1.0 if options.alpha is None else options.alpha / options.rank
        self.down = nn.Parameter(torch.empty(self.down_geometry.weight_shape()))
        self.experts: Any = nn.ModuleList(ScaleExpert(rank, host.groups, scale) for scale in options.scales)
        self.router = Router(rank, len(options.scales), options.top_k, host.groups)
        self.up = nn.Parameter(torch.zeros(self.up_geometry.weight_shape()))
        self.dropout = nn.Dropout(options.dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update, shaped like the host's output."""
        hidden = convolve_trained(self.down_geometry, self.dropout(x), self.down)
        images = hidden if hidden.ndim == 4 else hidden.unsqueeze(0)
        gates, probabilities = self.router(images)
        self.note_balance(gates, probabilities)
        maps = [weigh_by_group(expert(images), gates, k) for k, expert in enumerate(self.experts)]
        mixed = reduce(torch.add, maps).reshape(hidden.shape)
        return convolve_trained(self.up_geometry, mixed, self.up) * self.scale
