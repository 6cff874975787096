"""MoNA, the multi-cognitive visual adapter: a bottleneck with a scaled input norm and depthwise branches.

Paper: Yin et al., 5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks,
arXiv:2408.08345 (CVPR 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Adapter, Site
from .branches import Branch, is_traced, sum_of_kernels, zeroed
from .layers import Filter, Standardize, image_of, pixels_of
from .options import AdapterOptions, odd_kernels, positive, probability
from .registry import register_adapter

_NORM_START = 1e-6  # initial value of s1, as in the authors' code: the norm starts with almost no weight


@dataclass(frozen=True)
class MonaOptions(AdapterOptions):
    """Options of ``mona``.

    Attributes:
        rank: the width of the bottleneck (the paper's 64).
        kernel_sizes: the depthwise branches, odd.
        dropout: dropout probability on the map between GELU and the up projection, in training.
    """

    rank: int = 64
    kernel_sizes: tuple[int, ...] = (3, 5, 7)
    dropout: float = 0.0

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "rank")
        yield from probability(self, "dropout")
        yield from odd_kernels(self.kernel_sizes)


@register_adapter("mona")
class Mona(Adapter):
    """``f(z) = U GELU( p(d(D n(z))) )``, on a module's output.

    ``n(z) = s1 * LayerNorm(z) + s2 * z`` normalises each pixel over its channels, with learnable s1 and s2 for each
    channel; ``d(h) = mean_k DW_k(h) + h`` has several kernel sizes; ``p(h) = M h + h`` mixes channels. D, M and U are
    1x1; U starts at zero, so ``f`` does.

    The norm and the GELU are not linear, so it does not merge. The branches run as one depthwise convolution with the
    mean of their kernels, in training too.

    Reference: arXiv:2408.08345, eq. 2-4 and fig. 4.
    """

    places = ("output",)
    Options = MonaOptions
    merge_refusal = "its GELU and its input norm are not linear, so no convolution equals it"
    image_parts = "depthwise branches"

    def __init__(self, site: Site, options: MonaOptions) -> None:
        super().__init__(site, options)
        channels, rank = site.geometry.out_channels, options.rank
        self.norm = Standardize(channels)
        self.norm_scale = nn.Parameter(torch.full((channels,), _NORM_START))
        self.input_scale = nn.Parameter(torch.ones(channels))
        self.down = Filter(channels, rank, 1)
        grid = site.geometry.with_channels(rank, rank, groups=rank)
        self.branches: Any = nn.ModuleList(Branch(grid.resized((k, k)), bias=True) for k in options.kernel_sizes)
        self.inner = grid.resized((max(options.kernel_sizes),) * 2)
        self.mix = Filter(rank, rank, 1)
        self.dropout = nn.Dropout(options.dropout)
        self.up = zeroed(Filter(rank, channels, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Return the update, shaped like ``z``."""
        hidden = self._linear_part(self.down(self._normed(z)))
        return self.up(self.dropout(F.gelu(hidden)))

    def _normed(self, z: Tensor) -> Tensor:
        """Return ``s1 * LayerNorm(z) + s2 * z``; s1 is multiplied into the norm's gain, which saves a map in memory."""
        pixels = pixels_of(z)
        gain, shift = self.norm.weight * self.norm_scale, self.norm.bias * self.norm_scale
        normed = F.layer_norm(pixels, self.norm.normalized_shape, gain, shift, self.norm.eps)
        return image_of(normed + pixels * self.input_scale)

    def _linear_part(self, hidden: Tensor) -> Tensor:
        """Return ``p(d(hidden))``, with the mean of the branches as one depthwise convolution."""
        if is_traced(hidden):
            mean = reduce(torch.add, [branch(hidden) for branch in self.branches]) / len(self.branches)
        else:
            host = self.site.geometry.kernel_size
            kernel = sum_of_kernels(self.branches, host, self.inner.kernel_size) / len(self.branches)
            bias = reduce(torch.add, [branch.bias for branch in self.branches]) / len(self.branches)
            mean = self.inner.convolve(hidden, kernel, bias)
        hidden = mean + hidden
        return self.mix(hidden) + hidden
