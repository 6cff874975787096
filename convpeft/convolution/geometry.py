"""``ConvGeometry``: every field of a convolution except its weights, read once from a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GeometryError

Pair = tuple[int, int]

Sides = tuple[int, int, int, int]  # top, bottom, left, right

PLAIN_HOSTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

# written to files only where they differ from their defaults: files of earlier versions do not have them
LATER_FIELDS = ("transposed", "output_padding")

_FLIP = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class ConvGeometry:
    """The settings of a 2-d convolution: everything except its weight and bias.

    A ``Linear`` is described as a 1x1 convolution over the last axis (``linear=True``), and a ``ConvTranspose2d`` with
    ``transposed=True``. Kernels have one layout for all three, ``(out, in_per_group, kh, kw)``; ``as_kernel`` converts
    a layer's own weight to it, ``as_weight`` converts back.

    Attributes:
        padding: pixels added at the top, bottom, left and right of the input; negative values crop. For a transposed
            convolution: pixels cropped from the output; negative values add zeros.
        dynamic_kernel: ``None``, or the kernel size from which TensorFlow's ``same`` padding is computed for each
            input size; ``padding`` is added to it.
        linear: the layer is a ``Linear``: channels are the last axis.
        transposed: the layer is a ``ConvTranspose2d``.
        output_padding: extra rows and columns at the bottom and right of a transposed convolution's output.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    dynamic_kernel: Pair | None = None
    linear: bool = False
    transposed: bool = False
    output_padding: Pair = (0, 0)

    @classmethod
    def of(cls, layer: nn.Module) -> ConvGeometry:
        """Return the geometry of a ``Conv2d``, ``ConvTranspose2d`` or ``Linear`` (subclasses included).

        Raises:
            GeometryError: for any other module.
        """
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features, linear=True)
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            raise GeometryError(f"{type(layer).__name__} is no Conv2d, ConvTranspose2d or Linear")
        kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
        dynamic = is_tf_same(layer)
        padding = (0, 0, 0, 0) if dynamic else _layer_padding(layer, kernel, dilation)
        return cls(
            layer.in_channels, layer.out_channels, kernel, _pair(layer.stride), padding, dilation, layer.groups,
            layer.padding_mode, kernel if dynamic else None, transposed=layer.transposed,
            output_padding=_pair(layer.output_padding),
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvGeometry:
        return self  # nothing in it can change; a copied model has hundreds

    @property
    def in_per_group(self) -> int:
        """Number of input channels that each output channel reads."""
        return self.in_channels // self.groups

    @property
    def out_per_group(self) -> int:
        """Number of output channels in each group."""
        return self.out_channels // self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether the layer only mixes channels: 1x1, stride 1, no padding, not transposed."""
        plain = self.kernel_size == (1, 1) and self.stride == (1, 1) and not any(self.padding)
        return plain and self.dynamic_kernel is None and not self.transposed

    @property
    def macs(self) -> int:
        """Multiply-accumulates per output position over all output channels; if transposed, the mean, rounded up."""
        taps = self.out_channels * self.in_per_group * self.kernel_size[0] * self.kernel_size[1]
        return -(-taps // (self.stride[0] * self.stride[1])) if self.transposed else taps

    def weight_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of a kernel of this geometry, ``(out, in_per_group, kh, kw)``."""
        return (self.out_channels, self.in_per_group, *self.kernel_size)

    def as_kernel(self, weight: Tensor) -> Tensor:
        """Return a layer's own weight as a kernel of shape ``weight_shape()``.

        Args:
            weight: as the layer stores it: ``(out, in)`` for a ``Linear``, ``(in, out_per_group, kh, kw)`` for a
                ``ConvTranspose2d``.
        """
        return _swapped(weight, self.groups) if self.transposed else weight.reshape(self.weight_shape())

    def as_weight(self, kernel: Tensor) -> Tensor:
        """Return a kernel of shape ``weight_shape()`` as a layer stores it: the inverse of ``as_kernel``."""
        if self.transposed:
            return _swapped(kernel, self.groups)
        return kernel.flatten(1) if self.linear else kernel

    def with_channels(self, in_channels: int, out_channels: int, groups: int | None = None) -> ConvGeometry:
        """Return the same geometry with other channel counts (and groups, if given)."""
        groups = self.groups if groups is None else groups
        return replace(self, in_channels=in_channels, out_channels=out_channels, groups=groups)

    def pointwise(self, in_channels: int, out_channels: int, groups: int = 1) -> ConvGeometry:
        """Return a 1x1 geometry for the same tensor layout (images, or channels last for a ``Linear``)."""
        return ConvGeometry(in_channels, out_channels, groups=groups, linear=self.linear)

    def resized(self, kernel_size: Pair) -> ConvGeometry:
        """Return this geometry with another kernel size, centred on the same pixels and with the same output size.

        The padding grows by the taps added on each side; for a smaller kernel it shrinks, below zero if need be (it
        crops). When the sizes differ by an odd number of taps, the extra tap goes to the bottom and right.
        """
        before = [(new - old) // 2 for new, old in zip(kernel_size, self.kernel_size, strict=True)]
        after = [new - old - first for new, old, first in zip(kernel_size, self.kernel_size, before, strict=True)]
        top, bottom, left, right = self.padding
        (dh, dw) = self.dilation
        sides = (top + dh * before[0], bottom + dh * after[0], left + dw * before[1], right + dw * after[1])
        return replace(self, kernel_size=kernel_size, padding=sides)

    def covering(self, *kernel_sizes: Pair) -> ConvGeometry:
        """Return this geometry with the smallest kernel that contains every given size, grown evenly on both sides.

        Growing evenly keeps integer padding integer and ``'same'`` padding ``'same'``.
        """
        height, width = (
            old + 2 * max(0, *(-((old - size[axis]) // 2) for size in kernel_sizes))
            for axis, old in enumerate(self.kernel_size)
        )
        return self.resized((height, width))

    def grown(self, *kernel_sizes: Pair) -> ConvGeometry:
        """Return ``covering(*kernel_sizes)`` for a layer that shall give what this one gives; TF-style padding follows.

        Raises:
            GeometryError: if the larger kernel would be centred on other pixels, see ``shift_when_grown``.
        """
        larger = self.covering(*kernel_sizes)
        shift = self.shift_when_grown()
        if shift and larger.kernel_size != self.kernel_size:
            raise GeometryError(shift)
        if larger.dynamic_kernel is None:
            return larger
        return replace(larger, dynamic_kernel=larger.kernel_size, padding=(0, 0, 0, 0))

    def shift_when_grown(self) -> str | None:
        """Return why a larger kernel would be centred on other pixels than this one, or None when it would not.

        TensorFlow's ``same`` padding is clamped at zero: a kernel that spans less than its stride gets no padding on
        some input sizes, and then the padding of a larger kernel does not grow evenly on both sides.
        """
        if self.dynamic_kernel is None:
            return None
        spans = [(k - 1) * d + 1 for k, d in zip(self.dynamic_kernel, self.dilation, strict=True)]
        if all(span >= stride for span, stride in zip(spans, self.stride, strict=True)):
            return None
        return (
            f"its TF-style 'same' padding is clamped (kernel span {tuple(spans)} below stride {self.stride}), "
            "so a larger kernel would be centred on other pixels"
        )

    def settled(self) -> ConvGeometry:
        """Return the same geometry, without dynamic padding if that is always zero (as for a 1x1 kernel)."""
        return replace(self, dynamic_kernel=None) if self.dynamic_kernel == (1, 1) else self

    def amounts(self, height: int, width: int) -> Sides:
        """Return the padding for an input of this size, dynamic padding included: top, bottom, left, right."""
        if self.dynamic_kernel is None:
            return self.padding
        (th, bh), (lw, rw) = (
            _tf_same(size, k, s, d)
            for size, k, s, d in zip((height, width), self.dynamic_kernel, self.stride, self.dilation, strict=True)
        )
        top, bottom, left, right = self.padding
        return (top + th, bottom + bh, left + lw, right + rw)

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """Return the convolution of ``x`` with ``weight``, with every setting of this geometry.

        Args:
            x: ``(N, in, H, W)`` or ``(in, H, W)``; for a linear geometry ``(..., in)``.
            weight: shape ``weight_shape()``.
            bias: shape ``(out,)`` or None.
            output_size: height and width of a transposed convolution's output; None: as ``output_padding`` gives it.
        """
        if self.transposed:
            return self._convolve_transposed(x, weight, bias, output_size)
        if self.linear:
            return F.linear(x, weight.flatten(1), bias)
        top, bottom, left, right = self.amounts(x.shape[-2], x.shape[-1])
        if self.padding_mode == "zeros" and top == bottom >= 0 and left == right >= 0:
            return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
        x = _pad(x, (top, bottom, left, right), self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def _convolve_transposed(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None
    ) -> Tensor:
        """Return the transposed convolution; output pixels that no tap reaches are zero plus the bias."""
        weight, (top, bottom, left, right) = self.as_weight(weight), self.padding
        extra = self.output_padding if output_size is None else self._output_padding_for(x, output_size)
        if top == bottom >= 0 and left == right >= 0:
            return F.conv_transpose2d(x, weight, bias, self.stride, (top, left), extra, self.groups, self.dilation)
        whole = F.conv_transpose2d(x, weight, None, self.stride, 0, 0, self.groups, self.dilation)
        y = _pad(whole, (-top, extra[0] - bottom, -left, extra[1] - right), "zeros")
        return y if bias is None else y + bias.view(-1, 1, 1)

    def _output_padding_for(self, x: Tensor, output_size: Sequence[int]) -> Pair:
        """Return the ``output_padding`` with which ``x`` gives an output of ``output_size``."""
        top, bottom, left, right = self.padding
        unpadded = [
            (pixels - 1) * stride + (taps - 1) * dilation + 1 - cropped
            for pixels, stride, taps, dilation, cropped in zip(
                x.shape[-2:], self.stride, self.kernel_size, self.dilation, (top + bottom, left + right), strict=True
            )
        ]
        return (output_size[0] - unpadded[0], output_size[1] - unpadded[1])

    def sample(self, x: Tensor) -> Tensor:
        """Return the pixels that a 1x1 kernel of this geometry reads: ``x`` padded or cropped, then strided."""
        if self.is_pointwise:
            return x
        x = _pad(x, self.amounts(x.shape[-2], x.shape[-1]), self.padding_mode)
        return x[..., :: self.stride[0], :: self.stride[1]]

    def imprint(self, layer: nn.Module) -> None:
        """Write this geometry's settings to a ``Conv2d`` or ``ConvTranspose2d``, in place; the caller sets its weight.

        Raises:
            GeometryError: if the layer cannot express it (uneven or negative padding).
        """
        if self.linear:
            return
        assert isinstance(layer, nn.ConvTranspose2d if self.transposed else nn.Conv2d)
        layer.in_channels, layer.out_channels, layer.groups = self.in_channels, self.out_channels, self.groups
        layer.kernel_size, layer.stride, layer.dilation = self.kernel_size, self.stride, self.dilation
        layer.output_padding = self.output_padding
        if self.dynamic_kernel is not None:
            return
        top, bottom, left, right = self.padding
        layer.padding_mode = self.padding_mode  # type: ignore[assignment]
        layer._reversed_padding_repeated_twice = [left, right, top, bottom]
        if layer.padding == "same" and self.padding == padding_sides("same", self.kernel_size, self.dilation):
            return
        if top != bottom or left != right or min(self.padding) < 0:
            raise GeometryError(f"padding {self.padding} (top, bottom, left, right) is not one Conv2d can express")
        layer.padding = (top, left)

    def build(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a plain ``Conv2d``, ``ConvTranspose2d`` or ``Linear`` of this geometry with this weight and bias.

        Args:
            weight: shape ``weight_shape()``; it is copied, and the layer has its dtype and device.
            bias: shape ``(out,)`` or None; it is copied.
        """
        has_bias = bias is not None
        uneven = self.padding[::2] != self.padding[1::2] and self.stride == (1, 1)  # only 'same' can express that
        if self.linear:
            layer: Any = nn.Linear(self.in_channels, self.out_channels, has_bias, device="meta")
        else:
            plain: Any = nn.ConvTranspose2d if self.transposed else nn.Conv2d
            layer = plain(
                self.in_channels, self.out_channels, self.kernel_size, padding="same" if uneven else 0,
                groups=self.groups, bias=has_bias, padding_mode=self.padding_mode, device="meta",
            )  # fmt: skip
            self.imprint(layer)
        layer.weight = nn.Parameter(self.as_weight(weight).detach().clone(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for an adapter file; ``LATER_FIELDS`` only where they are not the default."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
            if key not in LATER_FIELDS or value != getattr(type(self), key)
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ConvGeometry:
        """Return the geometry from the output of ``to_dict``, of this version or an earlier one."""
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**values)

    def __str__(self) -> str:
        if self.linear:
            return f"{self.in_channels}→{self.out_channels}"
        kernel = "×".join(map(str, self.kernel_size))
        stride = self.stride[0] if self.stride[0] == self.stride[1] else self.stride
        strided = "" if stride == 1 else f" s{stride}"
        groups = "" if self.groups == 1 else f" g{self.groups}"
        transposed = " transposed" if self.transposed else ""
        return f"{self.in_channels}→{self.out_channels} {kernel}{strided}{groups}{transposed}"


def is_tf_same(layer: nn.Module) -> bool:
    """Return whether the layer computes TensorFlow's ``same`` padding for each input size.

    These are timm's ``Conv2dSame``, and its weight-standardised layers whose ``same_pad`` is set.
    """
    timms = [base for base in type(layer).__mro__ if base.__module__.startswith("timm.")]
    return any(base.__name__ == "Conv2dSame" for base in timms) or bool(timms and getattr(layer, "same_pad", False))


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Return a weight with its first two axes (input and output channels) transposed within each group."""
    grouped = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _layer_padding(layer: Any, kernel: Pair, dilation: Pair) -> Sides:
    """Return the padding a layer's forward uses, which in every mode except ``zeros`` is not its ``padding``."""
    before_and_after = getattr(layer, "_reversed_padding_repeated_twice", None)
    if layer.padding_mode == "zeros" or not before_and_after:
        return padding_sides(layer.padding, kernel, dilation)
    left, right, top, bottom = before_and_after
    return (top, bottom, left, right)


def padding_sides(padding: Any, kernel: Pair, dilation: Pair) -> Sides:
    """Return a ``Conv2d``'s ``padding`` (a number, a pair, ``'same'`` or ``'valid'``) as top, bottom, left, right."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        return (top, total[0] - top, left, total[1] - left)
    height, width = _pair(padding)
    return (height, height, width, width)


def _tf_same(size: int, kernel: int, stride: int, dilation: int) -> Pair:
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return (total // 2, total - total // 2)


def _pad(x: Tensor, sides: Sides, mode: str) -> Tensor:
    """Return ``x`` padded, then cropped where a side is negative, so circular padding wraps around the whole input."""
    top, bottom, left, right = sides
    grow = [max(0, left), max(0, right), max(0, top), max(0, bottom)]
    if any(grow) and _wraps_more_than_once(x, grow, mode):
        x = _repeated(_repeated(x, -2, grow[2], grow[3], mode), -1, grow[0], grow[1], mode)
    elif any(grow):
        x = F.pad(x, grow, mode=_FLIP[mode])
    if min(sides) >= 0:
        return x
    return x[..., max(0, -top) : min(0, bottom) or None, max(0, -left) : min(0, right) or None]


def _wraps_more_than_once(x: Tensor, grow: Sequence[int], mode: str) -> bool:
    """Return whether a padding is larger than ``F.pad`` allows; sizes are not looked at where any is allowed."""
    if mode not in ("reflect", "circular"):
        return False
    fewer = int(mode == "reflect")
    return max(grow[2:]) > x.shape[-2] - fewer or max(grow[:2]) > x.shape[-1] - fewer


def _repeated(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Return ``x`` with one axis padded by more than ``F.pad`` allows: wrapped or reflected more than once."""
    pixels = x.shape[axis]
    period = pixels if mode == "circular" else max(1, 2 * (pixels - 1))
    positions = torch.arange(-before, pixels + after, device=x.device) % period
    return x.index_select(axis, torch.where(positions < pixels, positions, period - positions))


def output_geometry(channels: int, channels_last: bool) -> ConvGeometry:
    """Return the 1x1 geometry of an adapter on a module's output with ``channels`` channels."""
    return ConvGeometry(channels, channels, linear=channels_last)


def random_input(geometry: ConvGeometry, size: int, generator: torch.Generator) -> Tensor:
    """Return a small random float64 input: ``(2, in, size, size + 1)``, or ``(2, in)`` for a linear geometry."""
    shape = (2, geometry.in_channels) if geometry.linear else (2, geometry.in_channels, size, size + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
