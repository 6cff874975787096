"""The layers that adapters are made of: convolution, linear layer and norms, of classes that nobody else looks for.

Code around a model initialises, freezes, replaces or fuses layers by their class (``isinstance(m, nn.Conv2d)``) or by its
name, and would take an adapter's layers for the model's own. These compute what torch's do and begin with the same
values; they have no ``reset_parameters``, for whoever calls that means the model too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pixels_of(image: Tensor) -> Tensor:
    """Return a map ``(..., C, H, W)`` as pixels ``(..., H, W, C)``; torch's older ONNX exporter wants axes from the front."""
    return image.movedim(image.ndim - 3, image.ndim - 1)


def image_of(pixels: Tensor) -> Tensor:
    """Return pixels ``(..., H, W, C)`` as a map ``(..., C, H, W)``."""
    return pixels.movedim(pixels.ndim - 1, pixels.ndim - 3)


class Filter(nn.Module):
    """What ``nn.Conv2d`` computes, with a square kernel, stride 1 and zero padding; its fields have the same names."""

    def __init__(self, inputs: int, outputs: int, size: int, *, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = inputs, outputs, groups
        self.kernel_size, self.padding, self.stride, self.dilation = (size, size), (padding, padding), (1, 1), (1, 1)
        self.padding_mode = "zeros"
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, size, size))
        self.bias = nn.Parameter(torch.empty(outputs))
        _as_torch_does(nn.Conv2d, self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of a map ``(..., C, H, W)``."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Return the sizes."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, padding={self.padding}, groups={self.groups}"


class Affine(nn.Module):
    """What ``nn.Linear`` computes."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        _as_torch_does(nn.Linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the weight along the last axis."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Standardize(nn.Module):
    """What ``nn.LayerNorm`` computes, over the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (channels,), 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised, scaled and shifted values, shaped like ``x``."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class StandardizeMap(nn.Module):
    """What ``nn.GroupNorm`` computes with one group: each map over all channels and pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised, scaled and shifted map, shaped like ``x``."""
        return F.group_norm(x, 1, self.weight, self.bias, self.eps)


def _as_torch_does(kind: Any, layer: nn.Module) -> None:
    """Fill a layer's weight and bias, in place, with the random values that torch's own layer of this kind gets."""
    kind.reset_parameters(layer)
