"""Probes: what only running a copy tells of a layer: whether it is the convolution it declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..convolution.comparison import compare
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry, random_input
from ..hosts.modules import base_class
from ..hosts.swap import plain_copy
from ..hosts.trials import private_copy, unobserved


def unlike_its_convolution(layer: nn.Module) -> str | None:
    """Return in what way a layer's output cannot take a parallel adapter, found by running a copy of it; or None.

    Only subclasses are run: their forward may do more than ``conv(x, weight)``. Other values are fine, since the adapter is
    added to whatever comes out and a merge is probed again. Another shape is not, for any way a stride can end at the
    border.
    """
    geometry = ConvGeometry.of(layer)
    smallest = _probe_size(geometry)
    sizes = range(smallest, smallest + max(geometry.stride))
    plain = private_copy(layer).to(device="cpu").eval()
    return next(filter(None, (_unlike_at(plain, geometry, size) for size in sizes)), None)


def _unlike_at(plain: nn.Module, geometry: ConvGeometry, size: int) -> str | None:
    x = random_input(geometry, size, torch.Generator().manual_seed(0))
    try:
        output = _run_alone(plain, x)
    except Exception as error:  # the user's own layer: whatever it raises, the plan says it
        return _failed(x, error)
    expected = geometry.convolve(x, torch.zeros(geometry.weight_shape(), dtype=x.dtype, device="cpu")).shape
    if isinstance(output, Tensor) and output.shape == expected:
        return None
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    return f"its forward gives {got} where its geometry says {tuple(expected)}: it is not the convolution it declares"


def _run_alone(plain: Any, x: Tensor) -> Any:
    """Return what a layer makes of ``x``, in float64, or in float32 where it knows no other (quantisation, say)."""
    with torch.no_grad(), unobserved():
        try:
            return plain.to(dtype=torch.float64)(x)
        except Exception:
            return plain.to(dtype=torch.float32)(x.float())


def _failed(x: Tensor, error: Exception) -> str:
    return f"its forward failed on an input of shape {tuple(x.shape)}: {error}"


def _probe_size(geometry: ConvGeometry) -> int:
    """Return a size at which the kernel sees pixels that are no border, and every padding is smaller than the input."""
    return max(2 * max(geometry.kernel_size) * max(geometry.dilation) + 5, *(side + 2 for side in geometry.padding))


def unreadable(layer: nn.Module) -> str | None:
    """Return why an adapter that computes with its layer's weight cannot do so here, or None when it can.

    The weight must be a plain parameter, since a computed one may change with each access. The layer's forward must be the
    convolution of that weight, or the adapter would not know what a change of the weight does to the output.
    """
    if layer._parameters.get("weight") is None:
        return "it computes with the layer's weight, which is no plain parameter here (parametrised, weight-normed or pruned)"
    if base_class(layer) in PLAIN_HOSTS:
        return None
    geometry = ConvGeometry.of(layer)
    generator = torch.Generator().manual_seed(0)
    x = random_input(geometry, _probe_size(geometry), generator)
    plain = plain_copy(layer)
    with torch.no_grad(), unobserved():
        declared = geometry.convolve(x, geometry.as_kernel(plain.weight), plain.bias)
        try:
            own = plain(x)
        except Exception as error:
            return f"it computes with the layer's weight, in float64 when it is checked, and {_failed(x, error)}"
    apart = compare(declared, own, 1e-9)
    if apart.is_rounding:
        return None
    return (
        "it computes with the layer's weight, and this layer's forward is not the convolution of its weight alone: on a "
        f"random input they differ by {apart.difference:.3g}, where the largest output is {apart.largest:.3g}"
    )
