"""A 2-d convolution, plain or transposed, as the loops of its definition: every pixel, every tap, every padding mode."""

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
        down, rows = _landing(grid, 0, i, height, weight.shape[2])
        for j in range(grid.size[1]):
            across, columns = _landing(grid, 1, j, width, weight.shape[3])
            pixels, taps = grouped[:, :, :, rows][..., columns], kernels[:, :, :, down][..., across]
            y[:, :, i, j] = torch.einsum("ngcst,gocst->ngo", pixels, taps).flatten(1)
    return y if bias is None else y + bias.double().view(-1, 1, 1)


def _landing(grid: Grid, axis: int, output: int, pixels: int, taps: int) -> tuple[list[int], list[int]]:
    """Return the taps that read a pixel for this output position along an axis, and the pixels they read."""
    start = grid.first[axis] + output * grid.stride[axis]
    read = [(tap, _source(start + tap * grid.dilation[axis], pixels, grid.mode)) for tap in range(taps)]
    found = [(tap, pixel) for tap, pixel in read if pixel is not None]
    return [tap for tap, _ in found], [pixel for _, pixel in found]


def spread(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.ConvTranspose2d, extra: tuple[int, int] | None = None
) -> Tensor:
    """Return ``y[n, o, i s + t d - p, ...] = b[o] + sum of w[c, o, t, ...] x[n, c, i, ...]`` over all that land there.

    Args:
        x: the input.
        weight: ``(in, out_per_group, kh, kw)``; a 1x1 one stands for the centre tap of the layer's own size.
        bias: or None.
        layer: whose fields to honour.
        extra: output padding; unset, the layer's own.
    """
    x, weight, groups = x.double(), weight.double(), layer.groups
    images, _, height, width = x.shape
    centre = [0, 0] if tuple(weight.shape[2:]) == layer.kernel_size else [taps // 2 for taps in layer.kernel_size]
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    grouped = x.reshape(images, groups, -1, height, width)
    size = [
        (pixels - 1) * stride - 2 * padding + dilation * (taps - 1) + more + 1
        for pixels, stride, padding, dilation, taps, more in zip(
            (height, width),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.kernel_size,
            extra or layer.output_padding,
            strict=True,
        )
    ]
    y = torch.zeros(images, groups, kernels.shape[2], *size, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for s in range(weight.shape[2]):
                for t in range(weight.shape[3]):
                    row = i * layer.stride[0] + (s + centre[0]) * layer.dilation[0] - layer.padding[0]
                    column = j * layer.stride[1] + (t + centre[1]) * layer.dilation[1] - layer.padding[1]
                    if 0 <= row < size[0] and 0 <= column < size[1]:
                        y[..., row, column] += torch.einsum("ngc,gco->ngo", grouped[..., i, j], kernels[..., s, t])
    y = y.flatten(1, 2)
    return y if bias is None else y + bias.double().view(-1, 1, 1)


def turned(kernel: Tensor, groups: int) -> Tensor:
    """Return ``(out, in_per_group, ...)`` as ``(in, out_per_group, ...)``, or the other way round, entry by entry."""
    per_group, across = kernel.shape[0] // groups, kernel.shape[1]
    result = torch.zeros(groups * across, per_group, *kernel.shape[2:], dtype=torch.float64)
    for group in range(groups):
        for a in range(per_group):
            for b in range(across):
                result[group * across + b, a] = kernel[group * per_group + a, b]
    return result


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a Conv2d, ConvTranspose2d or Linear computes."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        y = torch.einsum("...i,oi->...o", x.double(), layer.weight.double())
        return y if bias is None else y + bias
    if isinstance(layer, nn.ConvTranspose2d):
        return spread(x, layer.weight, bias, layer)
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
