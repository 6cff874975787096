"""A 2-d convolution as the loops of its definition: every output pixel, every tap, every padding mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Which pixels a layer looks at: output pixel ``o`` and tap ``t`` read ``first + o * stride + t * dilation``."""

    size: tuple[int, int]
    first: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    taps: tuple[int, int]
    mode: str

    def of_size(self, taps: tuple[int, int]) -> Grid:
        """Return the grid of a kernel of another size whose centre tap looks at the same pixel as this one's."""
        first = [
            start + step * (own // 2 - other // 2)
            for start, step, own, other in zip(self.first, self.dilation, self.taps, taps, strict=True)
        ]
        return Grid(self.size, (first[0], first[1]), self.stride, self.dilation, taps, self.mode)


def grid_of(layer: nn.Conv2d, x: Tensor) -> Grid:
    """Read the grid off a layer's own fields (and, for TensorFlow's ``same``, off the input's size)."""
    sizes, firsts = [], []
    for axis in (0, 1):
        pixels = x.shape[2 + axis]
        span = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        before, after = _padding(layer, axis, pixels, span)
        sizes.append((pixels + before + after - span) // layer.stride[axis] + 1)
        firsts.append(-before)
    return Grid(tuple(sizes), tuple(firsts), layer.stride, layer.dilation, layer.kernel_size, layer.padding_mode)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, grid: Grid) -> Tensor:
    """Return ``y[n, o, i, j] = b[o] + sum_{c, s, t} w[o, c, s, t] * x[n, c, row(i, s), column(j, t)]``."""
    x, weight = x.double(), weight.double()
    images, height, width = x.shape[0], x.shape[2], x.shape[3]
    grouped = x.reshape(images, groups, -1, height, width)
    kernels = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    y = torch.zeros(images, weight.shape[0], *grid.size, dtype=torch.float64)
    for i in range(grid.size[0]):
        for j in range(grid.size[1]):
            for s in range(weight.shape[2]):
                for t in range(weight.shape[3]):
                    row = _source(grid.first[0] + i * grid.stride[0] + s * grid.dilation[0], height, grid.mode)
                    column = _source(grid.first[1] + j * grid.stride[1] + t * grid.dilation[1], width, grid.mode)
                    if row is not None and column is not None:
                        pixel = grouped[:, :, :, row, column]
                        y[:, :, i, j] += torch.einsum("ngc,goc->ngo", pixel, kernels[..., s, t]).flatten(1)
    return y if bias is None else y + bias.double().view(-1, 1, 1)


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a Conv2d or Linear computes."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        y = torch.einsum("...i,oi->...o", x.double(), layer.weight.double())
        return y if bias is None else y + bias
    return convolve(x, layer.weight, bias, layer.groups, grid_of(layer, x))


def pointwise(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Return a grouped 1x1 convolution; ``weight`` is ``(out, in_per_group, 1, 1)``."""
    kernels = weight.double().reshape(groups, weight.shape[0] // groups, weight.shape[1])
    grouped = x.double().reshape(x.shape[0], groups, weight.shape[1], *x.shape[2:])
    return torch.einsum("ngchw,goc->ngohw", grouped, kernels).flatten(1, 2)


def _padding(layer: nn.Conv2d, axis: int, pixels: int, span: int) -> tuple[int, int]:
    if type(layer).__name__.endswith("Conv2dSame"):
        total = max(0, (math.ceil(pixels / layer.stride[axis]) - 1) * layer.stride[axis] + span - pixels)
        return total // 2, total - total // 2
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        return (span - 1) // 2, span - 1 - (span - 1) // 2
    return layer.padding[axis], layer.padding[axis]


def _source(position: int, pixels: int, mode: str) -> int | None:
    """Return which pixel stands at a position that may lie outside the image; None for a zero."""
    if 0 <= position < pixels:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(position, 0), pixels - 1)
    if mode == "circular":
        return position % pixels
    return -position if position < 0 else 2 * (pixels - 1) - position  # reflect, the edge not repeated
