"""Rep-MoNA: a linear low-rank update with depthwise branches of several sizes, which merges into convolutions.

It is MoNA (arXiv:2408.08345) made linear, in the spirit of structural re-parameterisation (RepVGG, arXiv:2101.03697).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..convolution.kernels import Chain, ConvKernel, compose_pointwise, embed_on_grid
from ..convolution.nodes import convolve_trained
from .base import Adapter, Entrance, Site, exact
from .branches import Branch, is_traced, shared_rank, sum_of_kernels
from .options import AdapterOptions, odd_kernels, positive, probability
from .registry import register_adapter

_DENSE = 16  # up to this many channels one dense convolution is faster than a depthwise and a 1x1, measured


@dataclass(frozen=True)
class RepMonaOptions(AdapterOptions):
    """Options of ``rep_mona``.

    Attributes:
        rank: r, the hidden channels; a grouped layer gets ``max(1, rank // groups)`` per group.
        kernel_sizes: kernel sizes of the depthwise branches, odd; they have the host's dilation.
        branch_norm: add a BatchNorm after each branch; its statistics belong to the adapter and are folded in a merge.
        scale: initial value of the learnable scalar s.
        dropout: dropout probability on the update's input, in training.
    """

    rank: int = 16
    kernel_sizes: tuple[int, ...] = (3, 5, 7)
    branch_norm: bool = False
    scale: float = 1.0
    dropout: float = 0.0

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "rank")
        yield from probability(self, "dropout")
        yield from odd_kernels(self.kernel_sizes)
        if self.scale == 0:
            yield "scale must not start at 0: with the up projection at 0 too, nothing would ever learn"


@register_adapter("rep_mona")
class RepMona(Adapter):
    """``f(x) = s * U( M(sum_k DW_k(D x)) + D x )`` with 1x1 D, M and U and depthwise DW_k; all of it is linear.

    Beside a layer the branches run on the layer's output grid (its stride, dilation and padding mode; kernels centred
    on the same pixels), so the whole update equals one kernel that is added to the layer's. On a module's output it is
    a chain of three plain convolutions. D and DW_k have no bias: D's would not be exact at a zero-padded border. U
    starts at zero, so ``f`` does.

    Reference: MoNA, arXiv:2408.08345, eq. 2-4, without the nonlinearity and the input norm.
    """

    places = ("parallel", "output")
    Options = RepMonaOptions
    image_parts = "depthwise branches"

    def __init__(self, site: Site, options: RepMonaOptions) -> None:
        super().__init__(site, options)
        host = site.geometry
        groups = host.groups
        rank = shared_rank(host, options.rank)
        self.down_geometry = host.pointwise(host.in_channels, rank, groups)
        self.mix_geometry = host.pointwise(rank, rank, groups)
        self.up_geometry = host.pointwise(rank, host.out_channels, groups)
        inner = host.with_channels(rank, rank, groups=rank)
        self.centre = inner.resized((1, 1))
        self.down = nn.Parameter(torch.empty(self.down_geometry.weight_shape()))
        sizes = [(k, k) for k in options.kernel_sizes]
        self.branches: Any = nn.ModuleList(Branch(inner.resized(size), norm=options.branch_norm) for size in sizes)
        largest = inner.covering(*sizes)
        same_centre = largest.kernel_size == max(sizes) and not host.shift_when_grown()
        self.one_pass = largest if same_centre and not options.branch_norm else None
        is_small = self.one_pass is not None and groups == 1 and rank <= _DENSE
        self.dense = replace(largest, groups=1) if is_small else None
        self.form = "one kernel" if is_small else "one pass" if self.one_pass is not None else "branches"
        self.mix = nn.Parameter(torch.empty(self.mix_geometry.weight_shape()))
        self.up = nn.Parameter(torch.zeros(self.up_geometry.weight_shape()))
        self.scale = nn.Parameter(torch.full((1,), options.scale))
        self.dropout = nn.Dropout(options.dropout)
        for weight in (self.down, self.mix):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the update, shaped like the host's output."""
        hidden = convolve_trained(self.down_geometry, self.dropout(x), self.down)
        return convolve_trained(self.up_geometry, self._mixed(hidden), self.up * self.scale)

    def _mixed(self, hidden: Tensor) -> Tensor:
        """Return ``M(sum_k DW_k h) + h``; without norms, one kernel or one depthwise pass serves all branches."""
        if self.one_pass is None or is_traced(hidden):
            scales = reduce(torch.add, [branch(hidden) for branch in self.branches])
            return self.mix_geometry.convolve(scales, self.mix) + self.centre.sample(hidden)
        size = self.one_pass.kernel_size
        kernel = sum_of_kernels(self.branches, self.site.geometry.kernel_size, size)
        if self.dense is None:
            scales = self.one_pass.convolve(hidden, kernel)
            return self.mix_geometry.convolve(scales, self.mix) + self.centre.sample(hidden)
        identity = torch.eye(len(kernel), device=kernel.device).to(kernel.dtype)[..., None, None]
        return self.dense.convolve(hidden, torch.addcmul(self._place(identity, size), self.mix, kernel.transpose(0, 1)))

    def entrance(self) -> Entrance | None:
        """Return D."""
        return Entrance(self.down, "pixel")

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return three convolutions: D with every row twice, a depthwise one, and U with M folded in.

        Of each pair of equal channels the depthwise step convolves one with ``sum_k DW_k`` and passes on the other's
        centre pixel. Doubling the rows is faster than two filters per channel, which torch's depthwise kernels do not
        cover.
        """
        grid = self.site.geometry
        size = grid.covering(*((k, k) for k in self.options.kernel_sizes)).kernel_size
        width = 2 * self.down_geometry.out_channels
        kernels = [branch.kernel() for branch in self.branches]
        placed = reduce(torch.add, [self._place(weight, size) for weight, _ in kernels])
        bias = reduce(torch.add, [bias for _, bias in kernels])
        centre = self._place(exact(torch.ones_like(self.down[:, :1, :1, :1])), size)
        depthwise = torch.stack([placed, centre], 1).flatten(0, 1)
        depthwise_bias = torch.stack([bias, torch.zeros_like(bias)], 1).flatten()
        groups = self.up_geometry.groups
        up = exact(self.up)
        mixed = compose_pointwise(up, exact(self.mix), groups)
        factor = torch.stack([mixed, up], 2).flatten(1, 2) * exact(self.scale)
        inner = grid.with_channels(width, width, groups=width).resized(size)
        doubled = exact(self.down).repeat_interleave(2, 0)
        return (
            ConvKernel(doubled, None, grid.pointwise(grid.in_channels, width, grid.groups)),
            ConvKernel(depthwise, depthwise_bias if self.options.branch_norm else None, inner),
            ConvKernel(factor, None, grid.pointwise(width, grid.out_channels, groups)),
        )

    def _place(self, kernel: Tensor, size: tuple[int, int]) -> Tensor:
        return embed_on_grid(kernel, self.site.geometry.kernel_size, size)
