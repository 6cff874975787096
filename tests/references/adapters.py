"""The adapters by the formulas of their papers, from bare tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .convolution import Grid, convolve, grid_of, pointwise, spread, turned


def lora_conv(layer: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``scale * B(A x)``: A on the layer's own grid (or on its centre pixel), B 1x1; arXiv:2106.09685, eq. 3."""
    if isinstance(layer, nn.ConvTranspose2d):
        return scale * pointwise(spread(x, turned(down, layer.groups), None, layer), up, layer.groups)
    grid = grid_of(layer, x).of_size(tuple(down.shape[2:]))
    return scale * pointwise(convolve(x, down, None, layer.groups, grid), up, layer.groups)


def lora_linear(x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``scale * x A^T B^T`` over the last axis."""
    return scale * (x.double() @ down.double().flatten(1).T @ up.double().flatten(1).T)


def rep_mona(
    grid: Grid,
    x: Tensor,
    down: Tensor,
    branches: list[Tensor],
    norms: list[nn.BatchNorm2d],
    mix: Tensor,
    up: Tensor,
    scale: float,
    groups: int,
) -> Tensor:
    """``s * U( M( sum_k BN_k(DW_k(D x)) ) + D x )``, every kernel centred on the pixel ``grid`` is centred on."""
    hidden = pointwise(x, down, groups)
    rank = hidden.shape[1]
    total = torch.zeros(())
    for number, weight in enumerate(branches):
        branch = convolve(hidden, weight, None, rank, grid.of_size(tuple(weight.shape[2:])))
        total = total + (batch_norm(branch, norms[number]) if norms else branch)
    centre = convolve(hidden, torch.ones(rank, 1, 1, 1), None, rank, grid.of_size((1, 1)))
    return scale * pointwise(pointwise(total, mix, groups) + centre, up, groups)


def bottleneck(z: Tensor, down: nn.Module, norm: nn.Module, up: nn.Module, gate: float) -> Tensor:
    """``g * up(GELU(norm(down z)))`` with GELU by its definition ``h * Phi(h)``; arXiv:1902.00751, fig. 2."""
    last = down.weight.ndim == 2
    hidden = _affine(z.double(), down, last)
    if not isinstance(norm, nn.Identity):
        flat = hidden.flatten(1)
        mean, variance = flat.mean(1), flat.var(1, unbiased=False)
        hidden = (hidden - mean.view(-1, 1, 1, 1)) / (variance.view(-1, 1, 1, 1) + norm.eps).sqrt()
        hidden = hidden * norm.weight.double().view(-1, 1, 1) + norm.bias.double().view(-1, 1, 1)
    activated = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return gate * _affine(activated, up, last)


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return ``(x - mean) / sqrt(var + eps) * weight + bias`` with the running statistics."""
    mean, variance, weight, bias = (
        tensor.double().view(-1, 1, 1) for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def _affine(x: Tensor, layer: nn.Module, last: bool) -> Tensor:
    weight, bias = layer.weight.double().flatten(1), layer.bias.double()
    y = torch.einsum("...i,oi->...o", x if last else x.movedim(1, -1), weight) + bias
    return y if last else y.movedim(-1, 1)
