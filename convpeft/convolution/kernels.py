"""Exact algebra on convolution kernels: compose, embed, balance and add them, tensors in, tensors out.

The kernels are float64; the caller casts the result once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from ..errors import GeometryError, ShapeMismatch
from .geometry import ConvGeometry, Pair


@dataclass(frozen=True)
class ConvKernel:
    """A convolution as data: weight ``(out, in_per_group, kh, kw)``, bias ``(out,)`` or None, and its geometry."""

    weight: Tensor
    bias: Tensor | None
    geometry: ConvGeometry

    def __post_init__(self) -> None:
        if tuple(self.weight.shape) != self.geometry.weight_shape():
            raise ShapeMismatch(f"weight {tuple(self.weight.shape)} for a geometry of {self.geometry.weight_shape()}")

    def __call__(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x``, in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x)
        return self.geometry.convolve(x, self.weight.to(x), bias)


Chain = Sequence[ConvKernel]


def compose_pointwise(outer: Tensor, inner: Tensor, groups: int = 1) -> Tensor:
    """Return the one kernel equal to running ``inner``, then a 1x1 ``outer``.

    Convolution is linear, so the pair collapses into one spatial kernel. Stride, padding, padding mode and
    dilation belong to ``inner`` and carry over, which is why the merge is exact for each of them.

    Args:
        outer: pointwise kernel, shape ``(out, rank / groups, 1, 1)``.
        inner: spatial kernel, shape ``(rank, in / groups, kh, kw)``.
        groups: both kernels' groups; group ``g`` of ``outer`` reads only group ``g`` of ``inner``.

    Raises:
        ShapeMismatch: if the kernels disagree on ``rank``.

    Example:
        >>> import torch
        >>> compose_pointwise(torch.ones(6, 2, 1, 1), torch.ones(2, 4, 3, 3)).shape
        torch.Size([6, 4, 3, 3])

    Reference: Hu et al., LoRA, arXiv:2106.09685, eq. 3, read as kernels.
    """
    if outer.shape[1] * groups != inner.shape[0]:
        raise ShapeMismatch(f"outer reads {outer.shape[1] * groups} channels, inner makes {inner.shape[0]}")
    left = outer.reshape(groups, outer.shape[0] // groups, outer.shape[1])
    right = inner.reshape(groups, inner.shape[0] // groups, -1)
    return (left @ right).reshape(outer.shape[0], *inner.shape[1:])


def compose_depthwise(depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """Return the one kernel equal to running a bias-free 1x1 ``pointwise``, then a ``depthwise`` on its channels.

    A 1x1 without bias maps padded pixels of its input to padded pixels of its output (zeros to zeros, a reflection to
    the same reflection), so the border is exact too. With a bias it would not be.

    Args:
        depthwise: shape ``(rank * multiplier, 1, kh, kw)``; channel ``r`` makes outputs ``r * multiplier ...``.
        pointwise: shape ``(rank, in_per_group, 1, 1)``.

    Raises:
        ShapeMismatch: if the channels do not divide.

    Example:
        >>> import torch
        >>> compose_depthwise(torch.ones(8, 1, 5, 5), torch.ones(4, 16, 1, 1)).shape
        torch.Size([8, 16, 5, 5])
    """
    multiplier, rest = divmod(depthwise.shape[0], pointwise.shape[0])
    if rest or depthwise.shape[1] != 1:
        raise ShapeMismatch(f"depthwise {tuple(depthwise.shape)} does not sit on {pointwise.shape[0]} channels")
    return depthwise * pointwise.repeat_interleave(multiplier, 0)


def embed_on_grid(kernel: Tensor, host_size: Pair, size: Pair) -> Tensor:
    """Return ``kernel`` zero-padded to ``size``, over the same pixels as ``ConvGeometry.resized`` places it.

    The larger kernel is the host's, grown evenly on each side; the smaller one is centred on the host's. This is exact
    for every padding mode, as long as the padding grows by the same number of taps.

    Args:
        kernel: shape ``(out, in_per_group, kh, kw)``.
        host_size: the host's own kernel size.
        size: kernel size of the result: ``host_size`` plus an even number on each axis.

    Raises:
        ShapeMismatch: if the kernel does not fit.

    Example:
        >>> import torch
        >>> embed_on_grid(torch.ones(1, 1, 1, 1), (1, 1), (3, 3))[0, 0].tolist()
        [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    pads: list[int] = []
    for axis in (1, 0):
        small, host, large = kernel.shape[2 + axis], host_size[axis], size[axis]
        before = (large - host) // 2 - (small - host) // 2
        pads += [before, large - small - before]
    if min(pads) < 0 or (size[0] - host_size[0]) % 2 or (size[1] - host_size[1]) % 2:
        raise ShapeMismatch(f"a {tuple(kernel.shape[2:])} kernel on a {host_size} host does not fit into {size}")
    return F.pad(kernel, pads) if any(pads) else kernel


def compose(chain: Chain) -> ConvKernel:
    """Return the one convolution equal to running the steps of ``chain`` one after the other.

    At most one step may be spatial. 1x1 steps after it can always be folded in; 1x1 steps before it only when they have
    no bias and it is depthwise.

    Raises:
        GeometryError: if two steps have no exact composition.
    """
    result = chain[0]
    for step in chain[1:]:
        result = _compose_pair(result, step)
    return result


def _compose_pair(first: ConvKernel, second: ConvKernel) -> ConvKernel:
    if second.geometry.is_pointwise and first.geometry.groups == second.geometry.groups:
        groups = first.geometry.groups
        weight = compose_pointwise(second.weight, first.weight, groups)
        bias = second.bias
        if first.bias is not None:
            mapped = compose_pointwise(second.weight, first.bias.reshape(-1, 1, 1, 1), groups).flatten()
            bias = mapped if bias is None else mapped + bias
        geometry = first.geometry.with_channels(first.geometry.in_channels, second.geometry.out_channels)
        return ConvKernel(weight, bias, geometry)
    depthwise = second.geometry.in_per_group == 1 and second.geometry.groups == first.geometry.out_channels
    if first.geometry.is_pointwise and depthwise and first.bias is None:
        weight = compose_depthwise(second.weight, first.weight)
        channels = first.geometry.in_channels, second.geometry.out_channels, first.geometry.groups
        return ConvKernel(weight, second.bias, second.geometry.with_channels(*channels))
    raise GeometryError(f"no exact composition of {first.geometry} followed by {second.geometry}")


def times(chain: Chain, factor: float) -> Chain:
    """Return a chain whose result is ``factor`` times that of ``chain``; for 1 the very same chain.

    Example:
        >>> import torch
        >>> step = ConvKernel(torch.ones(2, 3, 1, 1), torch.ones(2), ConvGeometry(3, 2))
        >>> times((step,), 0.5)[0].bias.tolist()
        [0.5, 0.5]
    """
    if factor == 1:
        return chain
    *steps, last = chain
    bias = None if last.bias is None else last.bias * factor
    return (*steps, replace(last, weight=last.weight * factor, bias=bias))


def balanced(chain: Chain) -> Chain:
    """Return an equal chain whose weights have similar magnitudes: each is scaled by a power of two, which is exact.

    ``1000 D`` followed by ``U / 1000`` equals ``D`` followed by ``U``, but would overflow or become subnormal when cast
    to half precision.

    Example:
        >>> import torch
        >>> large, small = torch.full((2, 3, 1, 1), 1024.0), torch.full((4, 2, 1, 1), 1 / 1024)
        >>> steps = (ConvKernel(large, None, ConvGeometry(3, 2)), ConvKernel(small, None, ConvGeometry(2, 4)))
        >>> [float(step.weight.max()) for step in balanced(steps)]
        [1.0, 1.0]
    """
    largest = [float(step.weight.abs().max()) for step in chain]
    if not all(0 < value < math.inf for value in largest):
        return chain
    mean = sum(map(math.log2, largest)) / len(largest)
    exponents = [round(mean - math.log2(value)) for value in largest[:-1]]
    exponents.append(-sum(exponents))
    steps, total = [], 0
    for step, exponent in zip(chain, exponents, strict=True):
        total += exponent
        bias = None if step.bias is None else step.bias * 2.0**total
        steps.append(replace(step, weight=step.weight * 2.0**exponent, bias=bias))
    return tuple(steps)


def add_kernels(host: ConvKernel, extra: Sequence[ConvKernel]) -> ConvKernel:
    """Return the one convolution equal to the sum of ``host`` and every ``extra``, on the host's output grid.

    Raises:
        GeometryError: if a larger kernel would be centred on other pixels than the host's.
    """
    geometry = host.geometry.grown(*(kernel.geometry.kernel_size for kernel in extra))
    host_size = host.geometry.kernel_size
    weight = embed_on_grid(host.weight, host_size, geometry.kernel_size)
    bias = host.bias
    for kernel in extra:
        weight = weight + embed_on_grid(kernel.weight, host_size, geometry.kernel_size)
        if kernel.bias is not None:
            bias = kernel.bias if bias is None else bias + kernel.bias
    return ConvKernel(weight, bias, geometry)
