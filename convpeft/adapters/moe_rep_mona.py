"""MoE-Rep-MoNA: a mixture of depthwise experts of several kernel sizes, with gates computed for each image.

Papers: Zhong et al., Conv-LoRA, arXiv:2401.17868 (experts of several scales in a low-rank update); Shazeer et al.,
arXiv:1701.06538 (top-k gates); Fedus et al., Switch Transformer, arXiv:2101.03961 (load balancing); Hu et al.,
Squeeze-and-Excitation, arXiv:1709.01507; Woo et al., CBAM, arXiv:1807.06521 (spatial attention).
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
from .base import Site
from .branches import Branch, shared_rank
from .gating import RoutedAdapter, Router, weigh_by_group
from .layers import Filter
from .options import AdapterOptions, odd_kernels, positive, probability
from .registry import register_adapter


@dataclass(frozen=True)
class MoeRepMonaOptions(AdapterOptions):
    """Options of ``moe_rep_mona``.

    Attributes:
        rank: r, the hidden channels; a grouped layer gets ``max(1, rank // groups)`` per group.
        kernel_sizes: the experts: one depthwise convolution of each size, odd, in the host's own dilation.
        top_k: number of experts with a nonzero gate for one image.
        squeeze: reduction of the squeeze-and-excitation block: its width is ``rank // squeeze`` (at least 1).
        spatial_attention: scale the pixels too (version 2).
        load_balancing: weight of the load-balancing loss; 0 is off (version 2 has it on, for example 0.01).
        dropout: dropout probability on the update's input, in training.
    """

    rank: int = 16
    kernel_sizes: tuple[int, ...] = (3, 5, 7)
    top_k: int = 2
    squeeze: int = 4
    spatial_attention: bool = False
    load_balancing: float = 0.0
    dropout: float = 0.0

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "rank", "top_k", "squeeze")
        yield from probability(self, "dropout")
        yield from odd_kernels(self.kernel_sizes)
        if self.top_k > len(self.kernel_sizes):
            yield f"top_k {self.top_k} is more than the {len(self.kernel_sizes)} experts of kernel_sizes"
        if self.load_balancing < 0:
            yield f"load_balancing must be 0 (off) or above, not {self.load_balancing!r}"


class SqueezeExcite(nn.Module):
    """``h * sigmoid(W2 SiLU(W1 mean(h)))``: scales the channels; W1 and W2 are grouped.

    Reference: arXiv:1709.01507, eq. 2-4, with SiLU for ReLU.
    """

    def __init__(self, channels: int, squeeze: int, groups: int) -> None:
        super().__init__()
        hidden = groups * max(1, channels // groups // squeeze)
        self.reduce = Filter(channels, hidden, 1, groups=groups)
        self.expand = Filter(hidden, channels, 1, groups=groups)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scaled map."""
        average = hidden.mean((-2, -1), keepdim=True)
        return hidden * self.expand(F.silu(self.reduce(average))).sigmoid()


class SpatialAttention(nn.Module):
    """``h * sigmoid(conv7x7([mean_c h; max_c h]))``: scales the pixels, separately in each group of channels.

    Reference: arXiv:1807.06521, eq. 3.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.conv = Filter(2 * groups, groups, 7, padding=3, groups=groups)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scaled map."""
        grouped = hidden.unflatten(-3, (self.groups, -1))
        pooled = torch.stack([grouped.mean(-3), grouped.amax(-3)], -3).flatten(-4, -3)
        return (grouped * self.conv(pooled).sigmoid().unsqueeze(-3)).flatten(-4, -3)


@register_adapter("moe_rep_mona")
class MoeRepMona(RoutedAdapter):
    """``f(x) = U SE( sum_k g_k(x) DW_k(D x) )`` with 1x1 D and U, depthwise experts DW_k and gates g for each image.

    Beside a layer the experts run on the layer's output grid (stride, dilation, padding), as ``rep_mona``'s branches
    do; ``spatial_attention`` comes after SE. U starts at zero, so ``f`` does. All experts run, those not chosen with
    gate 0: no shape depends on the data, and every parameter has a gradient in every step (DDP, ``torch.compile``).
    ``RoutedAdapter`` gives the load-balancing loss.
    """

    places = ("parallel", "output")
    Options = MoeRepMonaOptions
    merge_refusal = (
        "its gates and its squeeze-and-excitation depend on the input, so its experts stay separate and no convolution "
        "equals it"
    )
    image_parts = "depthwise experts"

    def __init__(self, site: Site, options: MoeRepMonaOptions) -> None:
        super().__init__(site, options)
        host = site.geometry
        groups, rank = host.groups, shared_rank(host, options.rank)
        self.down_geometry = host.pointwise(host.in_channels, rank, groups)
        self.up_geometry = host.pointwise(rank, host.out_channels, groups)
        inner = host.with_channels(rank, rank, groups=rank)
        self.router = Router(host.in_channels, len(options.kernel_sizes), options.top_k, groups)
        self.down = nn.Parameter(torch.empty(self.down_geometry.weight_shape()))
        self.experts: Any = nn.ModuleList(Branch(inner.resized((k, k))) for k in options.kernel_sizes)
        self.squeeze_excite = SqueezeExcite(rank, options.squeeze, groups)
        self.spatial: Any = SpatialAttention(groups) if options.spatial_attention else nn.Identity()
        self.up = nn.Parameter(torch.zeros(self.up_geometry.weight_shape()))
        self.dropout = nn.Dropout(options.dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update, shaped like the host's output."""
        gates, probabilities = self.router(x)
        self.note_balance(gates, probabilities)
        hidden = convolve_trained(self.down_geometry, self.dropout(x), self.down)
        experts = enumerate(self.experts)
        mixed = reduce(torch.add, [weigh_by_group(expert(hidden), gates, k) for k, expert in experts])
        return convolve_trained(self.up_geometry, self.spatial(self.squeeze_excite(mixed)), self.up)
