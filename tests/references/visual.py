"""``hierarchical``, ``mona`` and ``moe_rep_mona`` by their formulas: loops over pixels, heads and experts, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .convolution import Grid, convolve, grid_of, pointwise


def hierarchical(z: Tensor, adapter: nn.Module, mode: str, cells: int) -> Tensor:
    """``up(h3)``, with ``h0 = GELU(down z)`` and every step ``h + gate * step(h)``."""
    hidden = gelu(conv(z, adapter.down))
    double = conv(gelu(conv(hidden, adapter.conv.first)), adapter.conv.second)
    hidden = hidden + adapter.conv.gate.double() * double
    hidden = hidden + adapter.attention.gate.double() * attention(hidden, adapter.attention, mode, cells)
    normed = layer_norm(hidden, adapter.mlp.norm)
    inner = gelu(per_pixel(normed, adapter.mlp.first))
    hidden = hidden + adapter.mlp.gate.double() * per_pixel(inner, adapter.mlp.second)
    return conv(hidden, adapter.up)


def attention(hidden: Tensor, step: nn.Module, mode: str, cells: int) -> Tensor:
    """``Wo concat_heads sum_s softmax_s(q.k_s / sqrt(d)) v_s`` for one pixel after the other."""
    normed = layer_norm(hidden, step.norm)
    images, width, height, columns = normed.shape
    attended = torch.zeros_like(normed)
    for n in range(images):
        for row in range(height):
            for column in range(columns):
                seen = _pooled(normed[n], cells) if mode == "pooled" else _window(normed[n], row, column, cells)
                query = step.query.weight.double() @ normed[n, :, row, column]
                key, value = (step.key_value.weight.double() @ seen).chunk(2)
                for head in torch.arange(width).chunk(step.heads):
                    scores = key[head].T @ query[head] / math.sqrt(len(head))
                    attended[n, head, row, column] = value[head] @ scores.softmax(0)
    return per_pixel(attended, step.out)


def _pooled(image: Tensor, cells: int) -> Tensor:
    """Return ``(C, keys)``: averages over cells of equal size, those at the far borders over what is left."""
    height, width = image.shape[1:]
    tall, wide = math.ceil(height / cells), math.ceil(width / cells)
    means = [
        image[:, top : top + tall, left : left + wide].mean((1, 2))
        for top in range(0, height, tall)
        for left in range(0, width, wide)
    ]
    return torch.stack(means, 1)


def _window(image: Tensor, row: int, column: int, side: int) -> Tensor:
    """Return ``(C, keys)``: the pixels of the window that ``(row, column)`` lies in."""
    top, left = row // side * side, column // side * side
    return image[:, top : top + side, left : left + side].flatten(1)


def mona(z: Tensor, adapter: nn.Module) -> Tensor:
    """``U GELU(p(d(D(s1 LN(z) + s2 z))))``; arXiv:2408.08345, eq. 2-4."""
    scale, own = (s.double().view(-1, 1, 1) for s in (adapter.norm_scale, adapter.input_scale))
    hidden = conv(scale * layer_norm(z, adapter.norm) + own * z.double(), adapter.down)
    total = torch.zeros_like(hidden)
    for branch in adapter.branches:
        total = total + _depthwise(hidden, branch, grid_of(nn.Conv2d(1, 1, 1), hidden))
    hidden = total / len(adapter.branches) + hidden
    return conv(gelu(conv(hidden, adapter.mix) + hidden), adapter.up)


def moe_rep_mona(x: Tensor, adapter: nn.Module, grid: Grid, groups: int, top_k: int) -> Tensor:
    """``U A(SE(sum_k g_k DW_k(D x)))`` with A the spatial attention, group by group and image by image."""
    hidden = pointwise(x, adapter.down, groups)
    gates, _ = route(x, adapter.router, groups, top_k)
    maps = [_depthwise(hidden, expert, grid) for expert in adapter.experts]
    mixed = torch.zeros_like(maps[0])
    for n in range(len(x)):
        for group, channels in enumerate(torch.arange(hidden.shape[1]).chunk(groups)):
            for k, scale in enumerate(maps):
                mixed[n, channels] += gates[n, group, k] * scale[n, channels]
    squeeze = adapter.squeeze_excite
    average = mixed.mean((2, 3), keepdim=True)
    inner = conv(average, squeeze.reduce, groups)
    mixed = mixed * conv(inner * inner.sigmoid(), squeeze.expand, groups).sigmoid()
    if isinstance(adapter.spatial, nn.Identity):
        return pointwise(mixed, adapter.up, groups)
    parts = []
    for group, part in enumerate(mixed.chunk(groups, 1)):
        seen = torch.stack([part.mean(1), part.max(1).values], 1)
        weight, bias = (t.double()[group : group + 1] for t in (adapter.spatial.conv.weight, adapter.spatial.conv.bias))
        pixels = convolve(seen, weight, bias, 1, grid_of(nn.Conv2d(1, 1, 7, padding=3), seen))
        parts.append(part * pixels.sigmoid())
    return pointwise(torch.cat(parts, 1), adapter.up, groups)


def route(x: Tensor, router: nn.Module, groups: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Return gates and probabilities ``(N, groups, experts)``, choosing by sorting."""
    logits = conv(x.double().mean((2, 3), keepdim=True), router.score, groups).flatten(1)
    probabilities = torch.stack([part.softmax(1) for part in logits.chunk(groups, 1)], 1)
    gates = torch.zeros_like(probabilities)
    for n in range(gates.shape[0]):
        for group in range(groups):
            row = probabilities[n, group]
            values = row.tolist()
            chosen = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top_k]
            for k in chosen:
                gates[n, group, k] = row[k] / (row[chosen].sum() if top_k > 1 else 1)
    return gates, probabilities


def gelu(x: Tensor) -> Tensor:
    """GELU by its definition, ``x * Phi(x)``."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Normalise each pixel of ``(N, C, H, W)`` over its channels."""
    x = x.double()
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    weight, bias = norm.weight.double().view(-1, 1, 1), norm.bias.double().view(-1, 1, 1)
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def per_pixel(x: Tensor, layer: nn.Linear) -> Tensor:
    """Run a Linear over the channels of ``(N, C, H, W)``."""
    bias = layer.bias.double().view(-1, 1, 1)
    return torch.einsum("nihw,oi->nohw", x, layer.weight.double()) + bias


def conv(x: Tensor, layer: nn.Conv2d, groups: int | None = None) -> Tensor:
    """Run a convolution by the loops of its definition."""
    bias = None if layer.bias is None else layer.bias.double()
    return convolve(x.double(), layer.weight, bias, groups or layer.groups, grid_of(layer, x))


def _depthwise(hidden: Tensor, branch: nn.Module, grid: Grid) -> Tensor:
    size = tuple(branch.weight.shape[2:])
    return convolve(hidden, branch.weight, branch.bias, hidden.shape[1], grid.of_size(size))
