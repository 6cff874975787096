"""DoRA and Conv-LoRA by the formulas of their papers, from bare tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .convolution import convolve, grid_of, pointwise, spread, turned
from .visual import route


def dora_weight(layer: nn.Module, adapter: nn.Module) -> Tensor:
    """``W' = m (W + s BA) / ||W + s BA||``, one output channel and one tap at a time; arXiv:2402.09353, eq. 5."""
    options = adapter.options
    scale = (options.alpha or options.rank) / (math.sqrt(options.rank) if options.rslora else options.rank)
    own = _by_output(layer)
    weight = own.reshape(*own.shape[:2], -1)
    down, up = adapter.down.detach().double(), adapter.up.detach().double().flatten(1)
    groups = getattr(layer, "groups", 1)
    taps = getattr(layer, "kernel_size", (1, 1))
    seen = range(weight.shape[2]) if down.shape[2:] == taps else [(taps[0] // 2) * taps[1] + taps[1] // 2]
    changed = torch.zeros_like(weight)
    for channel in range(weight.shape[0]):
        group = channel // (weight.shape[0] // groups)
        rows = range(group * up.shape[1], (group + 1) * up.shape[1])
        direction = weight[channel].clone()
        for position, tap in enumerate(seen):
            for column, row in enumerate(rows):
                direction[:, tap] += scale * up[channel, column] * down[row].flatten(1)[:, position]
        magnitude = weight[channel].square().sum().sqrt() + adapter.magnitude.detach().double()[channel]
        changed[channel] = magnitude * direction / direction.square().sum().sqrt()
    return changed.reshape(own.shape)


def _by_output(layer: nn.Module) -> Tensor:
    """Return the layer's weight with its output channels first."""
    weight = layer.weight.detach().double()
    return turned(weight, layer.groups) if isinstance(layer, nn.ConvTranspose2d) else weight


def dora(layer: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor:
    """``conv(x, W') - conv(x, W)``, without the bias, which DoRA leaves alone."""
    weight, changed = _by_output(layer), dora_weight(layer, adapter)
    if isinstance(layer, nn.ConvTranspose2d):
        return spread(x, turned(changed - weight, layer.groups), None, layer)
    if isinstance(layer, nn.Linear):
        return torch.einsum("...i,oi->...o", x.double(), changed - weight)
    grid = grid_of(layer, x)
    return convolve(x, changed, None, layer.groups, grid) - convolve(x, weight, None, layer.groups, grid)


def conv_lora(layer: nn.Conv2d, adapter: nn.Module, x: Tensor) -> Tensor:
    """``(alpha / r) B sum_k g_k E_k(A x)``, image by image and group by group; arXiv:2401.17868, eq. 3-4."""
    options, groups = adapter.options, layer.groups
    hidden = convolve(x, adapter.down, None, groups, grid_of(layer, x).of_size(tuple(adapter.down.shape[2:])))
    gates, _ = route(hidden, adapter.router, groups, options.top_k)
    mixed = torch.zeros_like(hidden)
    for k, scale in enumerate(options.scales):
        large = resize(hidden, scale * hidden.shape[2], scale * hidden.shape[3])
        seen = convolve(large, adapter.experts[k].weight, None, groups, grid_of(nn.Conv2d(1, 1, 3, padding=1), large))
        back = resize(seen, *hidden.shape[2:])
        for n in range(len(x)):
            for group, channels in enumerate(torch.arange(hidden.shape[1]).chunk(groups)):
                mixed[n, channels] += gates[n, group, k] * back[n, channels]
    return (options.alpha or options.rank) / options.rank * pointwise(mixed, adapter.up, groups)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing by its definition: pixels have extent, and the outermost one is repeated beyond the edge."""
    y = torch.zeros(*x.shape[:2], height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            for row, row_weight in _neighbours(i, height, x.shape[2]):
                for column, column_weight in _neighbours(j, width, x.shape[3]):
                    y[:, :, i, j] += row_weight * column_weight * x[:, :, row, column].double()
    return y


def _neighbours(position: int, size: int, source_size: int) -> list[tuple[int, float]]:
    exact = max((position + 0.5) * source_size / size - 0.5, 0.0)
    first = min(int(exact), source_size - 1)
    share = exact - first
    return [(first, 1 - share), (min(first + 1, source_size - 1), share)]
