"""Adapters on any layer, from bare tensors: pad by hand, then torch's convolution without padding. Fast enough for thousands."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import _padding


def update(layer: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor:
    """Return ``f(x)`` of a ``lora`` (DoRA too) or ``rep_mona`` beside a layer, or on an output ``x``, in float64."""
    on_output = adapter.site.place == "output"
    if isinstance(layer, nn.Linear):
        return _linear(layer, adapter, x, on_output)
    host: nn.Module = nn.Conv2d(x.shape[1], x.shape[1], 1) if on_output else layer
    if adapter.kind == "rep_mona":
        return _rep_mona(host, adapter, x)
    if not adapter.options.dora:
        return at(host, x, product(adapter, host.groups))
    weight = by_output(layer)
    return at(layer, x, _dora(weight, whole(layer, product(adapter, layer.groups)), adapter) - weight)


def product(adapter: nn.Module, groups: int) -> Tensor:
    """Return ``(alpha / r) B A``, group by group."""
    options = adapter.options
    scale = (options.alpha or options.rank) / (math.sqrt(options.rank) if options.rslora else options.rank)
    pairs = zip(adapter.up.double().chunk(groups), adapter.down.double().chunk(groups), strict=True)
    return scale * torch.cat([torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down) for up, down in pairs])


def at(layer: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Return the convolution of ``x`` with a kernel ``(out, in_per_group, ...)`` centred where the layer's own kernel is."""
    if isinstance(layer, nn.ConvTranspose2d):
        swapped = [part.transpose(0, 1) for part in whole(layer, kernel).chunk(layer.groups)]
        fields = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return F.conv_transpose2d(x, torch.cat(swapped), None, *fields)
    pads: list[int] = []
    for axis in (1, 0):
        own, taps, step = layer.kernel_size[axis], kernel.shape[2 + axis], layer.dilation[axis]
        before, after = _padding(layer, axis, x.shape[2 + axis], (own - 1) * step + 1)
        first = taps // 2 - own // 2
        pads += [before + first * step, after + (taps - own - first) * step]
    x = pad(x, pads, "zeros" if type(layer).__name__.endswith("Same") else layer.padding_mode)
    return F.conv2d(x, kernel, None, layer.stride, 0, layer.dilation, layer.groups)


def pad(x: Tensor, sides: list[int], mode: str) -> Tensor:
    """Pad (left, right, top, bottom), one row and column at a time beyond what is there; negative numbers crop."""
    for axis, before, after in ((-1, *sides[:2]), (-2, *sides[2:])):
        pixels = x.shape[axis]
        rows = [x.select(axis, 0) * 0 if place is None else x.select(axis, place) for place in
                (_place(position, pixels, mode) for position in range(-before, pixels + after))]  # fmt: skip
        x = torch.stack(rows, axis)
    return x


def _place(position: int, pixels: int, mode: str) -> int | None:
    while mode == "reflect" and not 0 <= position < pixels:
        position = 0 if pixels == 1 else -position if position < 0 else 2 * (pixels - 1) - position
    if mode == "circular":
        return position % pixels
    if mode == "replicate":
        return min(max(position, 0), pixels - 1)
    return position if 0 <= position < pixels else None


def by_output(layer: nn.Module) -> Tensor:
    """Return the layer's weight as ``(out, in_per_group, ...)``."""
    weight = layer.weight.detach().double()
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    return torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)])


def whole(layer: nn.Module, kernel: Tensor) -> Tensor:
    """Return a 1x1 kernel at the centre tap of one of the layer's size; one of that size as it is."""
    if tuple(kernel.shape[2:]) == tuple(layer.kernel_size):
        return kernel
    large = kernel.new_zeros(*kernel.shape[:2], *layer.kernel_size)
    large[:, :, layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] = kernel[:, :, 0, 0]
    return large


def _dora(weight: Tensor, change: Tensor, adapter: nn.Module) -> Tensor:
    turned = weight + change
    size = weight.flatten(1).norm(dim=1) + adapter.magnitude.double()
    return turned * (size / turned.flatten(1).norm(dim=1)).view(-1, *[1] * (weight.ndim - 1))


def _linear(layer: nn.Linear, adapter: nn.Module, x: Tensor, on_output: bool) -> Tensor:
    change = product(adapter, 1)[:, :, 0, 0]
    if not on_output and adapter.options.dora:
        weight = layer.weight.detach().double()
        change = _dora(weight, change, adapter) - weight
    return x @ change.T


def _rep_mona(host: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor:
    groups = host.groups
    hidden = F.conv2d(x, adapter.down.double(), groups=groups)
    width = hidden.shape[1]
    fields = (host.kernel_size, host.stride, host.padding, host.dilation)
    grid = type(host).__new__(type(host))
    nn.Module.__init__(grid)
    grid.kernel_size, grid.stride, grid.padding, grid.dilation = fields
    grid.groups, grid.padding_mode = width, host.padding_mode
    seen = at(grid, hidden, torch.zeros(width, 1, 1, 1, dtype=x.dtype))
    for branch in adapter.branches:
        maps = at(grid, hidden, branch.weight.double())
        if adapter.options.branch_norm:
            norm = branch.norm
            gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            maps = (maps - norm.running_mean.double().view(-1, 1, 1)) * gain.view(-1, 1, 1)
            maps = maps + norm.bias.double().view(-1, 1, 1)
        seen = seen + maps
    centre = at(grid, hidden, torch.ones(width, 1, 1, 1, dtype=x.dtype))
    mixed = F.conv2d(seen, adapter.mix.double(), groups=groups) + centre
    return adapter.scale.double().view(1, 1, 1, 1) * F.conv2d(mixed, adapter.up.double(), groups=groups)
