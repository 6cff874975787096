"""One object that carries every field of a convolution, read once from a layer and never retyped."""

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

# files from before these fields were there lack them, as those of other layers still do
LATER_FIELDS = ("transposed", "output_padding")

_FLIP = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class ConvGeometry:
    """Everything about a 2-d convolution but its numbers.

    A ``Linear`` is the 1x1 convolution over the last axis (``linear=True``), so one description serves both. A transposed
    convolution (``transposed=True``) spreads each input pixel over the output. Kernels have one layout for all three,
    ``(out, in_per_group, kh, kw)``; ``as_kernel`` and ``as_weight`` go from a layer's own weight to it and back.

    Attributes:
        padding: pixels added at the top, bottom, left and right; negative crops. Transposed, it is the other way
            round and about the output: that many pixels are cropped there; negative adds zeros.
        dynamic_kernel: ``None``, or the kernel size from which TensorFlow's ``same`` padding is worked out anew
            for each input size; ``padding`` then comes on top of it.
        linear: the layer is a ``Linear``: channels are the last axis.
        transposed: the layer is a ``ConvTranspose2d``.
        output_padding: of a transposed convolution: further pixels at the bottom and right of the output.
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
        return cls(
            layer.in_channels,
            layer.out_channels,
            kernel,
            _pair(layer.stride),
            (0, 0, 0, 0) if dynamic else _own_sides(layer, kernel, dilation),
            dilation,
            layer.groups,
            layer.padding_mode,
            kernel if dynamic else None,
            transposed=layer.transposed,
            output_padding=_pair(layer.output_padding),
        )

    @property
    def in_per_group(self) -> int:
        """Input channels each output channel sees."""
        return self.in_channels // self.groups

    @property
    def out_per_group(self) -> int:
        """Output channels in each group."""
        return self.out_channels // self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether the layer mixes channels only: 1x1, stride 1, no padding, not transposed."""
        plain = self.kernel_size == (1, 1) and self.stride == (1, 1) and not any(self.padding)
        return plain and self.dynamic_kernel is None and not self.transposed

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one output position, all output channels; transposed, the mean, rounded up."""
        taps = self.out_channels * self.in_per_group * self.kernel_size[0] * self.kernel_size[1]
        return -(-taps // (self.stride[0] * self.stride[1])) if self.transposed else taps

    def weight_shape(self) -> tuple[int, int, int, int]:
        """Return the shape of a kernel of this geometry, ``(out, in_per_group, kh, kw)``."""
        return (self.out_channels, self.in_per_group, *self.kernel_size)

    def as_kernel(self, weight: Tensor) -> Tensor:
        """Return a layer's own weight as a kernel of shape ``weight_shape()``.

        Args:
            weight: as the layer keeps it: ``(out, in)`` for a ``Linear``, ``(in, out_per_group, kh, kw)`` for a
                ``ConvTranspose2d``.
        """
        return _swapped(weight, self.groups) if self.transposed else weight.reshape(self.weight_shape())

    def as_weight(self, kernel: Tensor) -> Tensor:
        """Return a kernel of shape ``weight_shape()`` as a layer keeps it: the inverse of ``as_kernel``."""
        if self.transposed:
            return _swapped(kernel, self.groups)
        return kernel.flatten(1) if self.linear else kernel

    def with_channels(self, in_channels: int, out_channels: int, groups: int | None = None) -> ConvGeometry:
        """Return the same geometry between other channels."""
        groups = self.groups if groups is None else groups
        return replace(self, in_channels=in_channels, out_channels=out_channels, groups=groups)

    def pointwise(self, in_channels: int, out_channels: int, groups: int = 1) -> ConvGeometry:
        """Return a 1x1 geometry over the same kind of tensor (images, or a ``Linear``'s last axis)."""
        return ConvGeometry(in_channels, out_channels, groups=groups, linear=self.linear)

    def resized(self, kernel_size: Pair) -> ConvGeometry:
        """Return the geometry of another kernel size, centred on the same pixels: same output size.

        The padding grows (or shrinks, or crops) by the taps added on each side. When the sizes differ by an odd
        number of taps the extra one goes to the bottom and right. (Transposed, the same of the output's pixels.)
        """
        before = [(new - old) // 2 for new, old in zip(kernel_size, self.kernel_size, strict=True)]
        after = [new - old - first for new, old, first in zip(kernel_size, self.kernel_size, before, strict=True)]
        top, bottom, left, right = self.padding
        (dh, dw) = self.dilation
        sides = (top + dh * before[0], bottom + dh * after[0], left + dw * before[1], right + dw * after[1])
        return replace(self, kernel_size=kernel_size, padding=sides)

    def covering(self, *kernel_sizes: Pair) -> ConvGeometry:
        """Return the smallest symmetric growth of this geometry that holds every given kernel size.

        Both sides grow alike, so integer padding stays integer padding and ``'same'`` stays ``'same'``.
        """
        grown = [
            old + 2 * max(0, *(-((old - size[axis]) // 2) for size in kernel_sizes))
            for axis, old in enumerate(self.kernel_size)
        ]
        return self.resized((grown[0], grown[1]))

    def shift_when_grown(self) -> str | None:
        """Say why a larger kernel would look at other pixels than this one, or None when it would not.

        TensorFlow's ``same`` padding is clamped at zero: a kernel that spans less than its stride gets none on some
        input sizes, and the padding of a larger kernel then no longer grows evenly on both sides.
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
        """Return the same geometry without dynamic padding where that is zero for every input: a 1x1 kernel."""
        return replace(self, dynamic_kernel=None) if self.dynamic_kernel == (1, 1) else self

    def amounts(self, height: int, width: int) -> Sides:
        """Return the padding for an input of this size: top, bottom, left, right."""
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
        """Return the convolution of ``x`` with ``weight``, every field of the geometry honoured.

        Args:
            x: ``(N, in, H, W)`` or ``(in, H, W)``; for a linear geometry ``(..., in)``.
            weight: shape ``weight_shape()``.
            bias: shape ``(out,)`` or None.
            output_size: height and width of the output of a transposed convolution; unset, as ``output_padding`` says.
        """
        if self.transposed:
            return self._spread(x, weight, bias, output_size)
        if self.linear:
            return F.linear(x, weight.flatten(1), bias)
        top, bottom, left, right = self.amounts(x.shape[-2], x.shape[-1])
        if self.padding_mode == "zeros" and top == bottom >= 0 and left == right >= 0:
            return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
        x = _pad(x, (top, bottom, left, right), self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def _spread(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        """Return the transposed convolution. Beyond the last tap of the last pixel the output is zero, but for the bias."""
        weight, (top, bottom, left, right) = self.as_weight(weight), self.padding
        extra = self.output_padding if output_size is None else self._extra(x, output_size)
        if top == bottom >= 0 and left == right >= 0:
            return F.conv_transpose2d(x, weight, bias, self.stride, (top, left), extra, self.groups, self.dilation)
        whole = F.conv_transpose2d(x, weight, None, self.stride, 0, 0, self.groups, self.dilation)
        y = _pad(whole, (-top, extra[0] - bottom, -left, extra[1] - right), "zeros")
        return y if bias is None else y + bias.view(-1, 1, 1)

    def _extra(self, x: Tensor, output_size: Sequence[int]) -> Pair:
        """Return by how many rows and columns an output exceeds the one without any ``output_padding``."""
        top, bottom, left, right = self.padding
        least = [
            (pixels - 1) * stride + (taps - 1) * dilation + 1 - cropped
            for pixels, stride, taps, dilation, cropped in zip(
                x.shape[-2:], self.stride, self.kernel_size, self.dilation, (top + bottom, left + right), strict=True
            )
        ]
        return (output_size[0] - least[0], output_size[1] - least[1])

    def sample(self, x: Tensor) -> Tensor:
        """Return the pixels a 1x1 kernel of this geometry looks at: padded or cropped, then every stride-th one."""
        if self.is_pointwise:
            return x
        x = _pad(x, self.amounts(x.shape[-2], x.shape[-1]), self.padding_mode)
        return x[..., :: self.stride[0], :: self.stride[1]]

    def imprint(self, layer: nn.Module) -> None:
        """Write this geometry onto a ``Conv2d`` or ``ConvTranspose2d`` in place (its weight is the caller's to set).

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
        if layer.padding == "same" and self.padding == _sides("same", self.kernel_size, self.dilation):
            return
        if top != bottom or left != right or min(self.padding) < 0:
            raise GeometryError(f"padding {self.padding} (top, bottom, left, right) is not one Conv2d can express")
        layer.padding = (top, left)

    def build(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a plain ``Conv2d``, ``ConvTranspose2d`` or ``Linear`` of this geometry that holds ``weight`` and ``bias``.

        Args:
            weight: shape ``weight_shape()``; the layer takes its dtype and device.
            bias: shape ``(out,)`` or None.
        """
        has_bias = bias is not None
        uneven = self.padding[::2] != self.padding[1::2] and self.stride == (1, 1)  # only 'same' can say that
        if self.linear:
            layer: Any = nn.Linear(self.in_channels, self.out_channels, has_bias, device="meta")
        else:
            plain: Any = nn.ConvTranspose2d if self.transposed else nn.Conv2d
            layer = plain(
                self.in_channels,
                self.out_channels,
                self.kernel_size,
                padding="same" if uneven else 0,
                groups=self.groups,
                bias=has_bias,
                padding_mode=self.padding_mode,
                device="meta",
            )
            self.imprint(layer)
        layer.weight = nn.Parameter(self.as_weight(weight).detach().clone(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for an adapter file; later ones only where they say something."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
            if key not in LATER_FIELDS or value != getattr(type(self), key)
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ConvGeometry:
        """Return the geometry that ``to_dict`` wrote, here or in an earlier version."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        return cls(**values)

    def __str__(self) -> str:
        if self.linear:
            return f"{self.in_channels}→{self.out_channels}"
        kernel = "×".join(map(str, self.kernel_size))
        stride = (
            "" if self.stride == (1, 1) else f" s{self.stride[0]}" if len(set(self.stride)) == 1 else f" s{self.stride}"
        )
        groups = "" if self.groups == 1 else f" g{self.groups}"
        transposed = " transposed" if self.transposed else ""
        return f"{self.in_channels}→{self.out_channels} {kernel}{stride}{groups}{transposed}"


def is_tf_same(layer: nn.Module) -> bool:
    """Return whether the layer pads as TensorFlow's ``same`` does, anew for each input size.

    That is timm's ``Conv2dSame``, and its standardised layers where their ``same_pad`` says so.
    """
    timms = [base for base in type(layer).__mro__ if base.__module__.startswith("timm.")]
    return any(base.__name__ == "Conv2dSame" for base in timms) or bool(timms and getattr(layer, "same_pad", False))


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Return a weight with the channels of its two first axes exchanged in each group."""
    grouped = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _own_sides(layer: Any, kernel: Pair, dilation: Pair) -> Sides:
    """Return a layer's padding; in all modes but ``zeros`` its forward reads another field than ``padding``."""
    before_and_after = getattr(layer, "_reversed_padding_repeated_twice", None)
    if layer.padding_mode == "zeros" or not before_and_after:
        return _sides(layer.padding, kernel, dilation)
    left, right, top, bottom = before_and_after
    return (top, bottom, left, right)


def _sides(padding: Any, kernel: Pair, dilation: Pair) -> Sides:
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
    """Pad, then crop where a side is negative: circular padding wraps around the whole input, not the cropped one."""
    top, bottom, left, right = sides
    grow = [max(0, left), max(0, right), max(0, top), max(0, bottom)]
    height, width = x.shape[-2], x.shape[-1]
    most = [height - (mode == "reflect"), width - (mode == "reflect")]
    if mode in ("reflect", "circular") and (max(grow[2:]) > most[0] or max(grow[:2]) > most[1]):
        x = _repeated(_repeated(x, -2, grow[2], grow[3], mode), -1, grow[0], grow[1], mode)
    elif any(grow):
        x = F.pad(x, grow, mode=_FLIP[mode])
    height, width = x.shape[-2], x.shape[-1]
    return x[..., max(0, -top) : height - max(0, -bottom), max(0, -left) : width - max(0, -right)]


def _repeated(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Pad one axis by more than torch does: round and round (``circular``), to and fro (``reflect``)."""
    pixels = x.shape[axis]
    period = pixels if mode == "circular" else max(1, 2 * (pixels - 1))
    positions = torch.arange(-before, pixels + after, device=x.device) % period
    return x.index_select(axis, torch.where(positions < pixels, positions, period - positions))


def output_geometry(channels: int, channels_last: bool) -> ConvGeometry:
    """Return the 1x1 geometry of an adapter that sits on a module's output of ``channels`` channels."""
    return ConvGeometry(channels, channels, linear=channels_last)


def random_input(geometry: ConvGeometry, size: int, generator: torch.Generator) -> Tensor:
    """Return a small float64 input for probes: ``(2, in, size, size + 1)``, or ``(2, in)`` for a linear geometry."""
    shape = (2, geometry.in_channels) if geometry.linear else (2, geometry.in_channels, size, size + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
