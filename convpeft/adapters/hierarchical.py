"""The hierarchical adapter: a bottleneck with a convolution, an attention and an MLP step, each a gated residual.

Papers: Houlsby et al., arXiv:1902.00751 (the bottleneck); Xie et al., ResNeXt, arXiv:1611.05431 (grouped double
convolution); Vaswani et al., arXiv:1706.03762 (attention); Wang et al., Pyramid Vision Transformer, arXiv:2102.12122
(keys and values from a smaller map); Liu et al., Swin Transformer, arXiv:2103.14030 (windows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..convolution.nodes import is_exporting
from .base import Adapter, Site
from .branches import zeroed
from .layers import Affine, Filter, Standardize, image_of, pixels_of
from .options import AdapterOptions, positive, probability
from .registry import register_adapter

_WIDEST_MLP = 1024
_LARGEST_WINDOW = 64  # pixels on each side: a smaller map is padded to it


@dataclass(frozen=True)
class HierarchicalOptions(AdapterOptions):
    """Options of ``hierarchical``.

    Attributes:
        reduction: the reduced width is ``channels // reduction`` (at least 1).
        rank: the reduced width itself, instead of a reduction.
        conv_groups: groups of the two 3x3 convolutions, lowered to the nearest divisor of the reduced width.
        heads: heads of the attention, lowered to the nearest divisor of the reduced width.
        attention: each pixel attends to the whole map, averaged into at most ``cells`` x ``cells`` keys (``pooled``),
            or to its own window of ``cells`` x ``cells`` pixels (``window``).
        cells: see ``attention``; each pixel has at most ``cells * cells`` keys, however large the map.
        mlp_ratio: hidden width of the MLP divided by the reduced width.
        gate: initial value of each step's learnable scalar gate.
        dropout: dropout probability on the map before the up projection, in training.
        recompute: save only the input of attention and MLP for backward, and recompute them there.
    """

    reduction: int = 4
    rank: int | None = None
    conv_groups: int = 4
    heads: int = 4
    attention: Literal["pooled", "window"] = "pooled"
    cells: int = 8
    mlp_ratio: float = 4.0
    gate: float = 1.0
    dropout: float = 0.0
    recompute: bool = True

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "reduction", "rank", "conv_groups", "heads", "cells", "mlp_ratio")
        yield from probability(self, "dropout")
        if self.mlp_ratio > _WIDEST_MLP:
            yield f"mlp_ratio must be at most {_WIDEST_MLP}, not {self.mlp_ratio!r}"
        if self.attention == "window" and self.cells > _LARGEST_WINDOW:
            yield f"cells must be at most {_LARGEST_WINDOW} with attention: window, not {self.cells}"


class DoubleConv(nn.Module):
    """``g * conv(GELU(conv h))`` with two 3x3 convolutions."""

    def __init__(self, width: int, groups: int, gate: float) -> None:
        super().__init__()
        self.first = Filter(width, width, 3, padding=1, groups=groups)
        self.second = Filter(width, width, 3, padding=1, groups=groups)
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the step, ``(N, width, H, W)``, without its residual."""
        hidden = F.gelu(self.first(hidden))
        return F.conv2d(hidden, *_gated(self.second, self.gate), padding=1, groups=self.second.groups)


class Attention(nn.Module):
    """``g * Wo softmax(q k^T / sqrt(d)) v`` over normalised pixels, in heads, with at most ``cells * cells`` keys."""

    def __init__(self, width: int, heads: int, mode: str, cells: int, gate: float) -> None:
        super().__init__()
        self.heads, self.mode, self.cells = heads, mode, cells
        self.norm = Standardize(width)
        self.query = Affine(width, width, bias=False)
        self.key_value = Affine(width, 2 * width, bias=False)
        self.out = Affine(width, width)
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the step, shaped like ``pixels``, ``(..., H, W, width)``, without its residual."""
        pixels = self.norm(pixels)
        attended = self._windowed(pixels) if self.mode == "window" else self._pooled(pixels)
        return F.linear(attended, *_gated(self.out, self.gate))

    def _pooled(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-3], pixels.shape[-2]
        step = (-(-height // self.cells), -(-width // self.cells))
        pooled = pixels_of(F.avg_pool2d(image_of(pixels), step, ceil_mode=True))
        first, last = pixels.ndim - 3, pixels.ndim - 2  # not negative, see pixels_of
        attended = self._attend(pixels.flatten(first, last), pooled.flatten(first, last), None)
        return attended.unflatten(first, (height, width))

    def _windowed(self, pixels: Tensor) -> Tensor:
        side, (height, width) = self.cells, pixels.shape[-3:-1]
        rows, columns = -(-height // side), -(-width // side)
        padding = (0, 0, 0, columns * side - width, 0, rows * side - height)
        tokens = _to_windows(F.pad(pixels, padding), side)
        is_pixel = _to_windows(F.pad(pixels.new_ones(height, width, 1), padding), side).bool()
        attended = self._attend(tokens, tokens, is_pixel.transpose(-1, -2).unsqueeze(-3))
        to_image = "... rows columns (a b) c -> ... (rows a) (columns b) c"
        return rearrange(attended, to_image, a=side, b=side)[..., :height, :width, :]

    def _attend(self, tokens: Tensor, sources: Tensor, mask: Tensor | None) -> Tensor:
        """Return attention of ``tokens`` ``(..., L, width)`` to ``sources`` ``(..., S, width)``, heads concatenated."""
        query = rearrange(self.query(tokens), "... l (heads d) -> ... heads l d", heads=self.heads)
        pairs = rearrange(self.key_value(sources), "... s (two heads d) -> two ... heads s d", two=2, heads=self.heads)
        key, value = pairs.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        return rearrange(attended, "... heads l d -> ... l (heads d)")


class Mlp(nn.Module):
    """``g * W2 GELU(W1 norm(h))`` on each pixel."""

    def __init__(self, width: int, hidden: int, gate: float) -> None:
        super().__init__()
        self.norm = Standardize(width)
        self.first = Affine(width, hidden)
        self.second = Affine(hidden, width)
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the step, shaped like ``pixels``, ``(..., H, W, width)``, without its residual."""
        return F.linear(F.gelu(self.first(self.norm(pixels))), *_gated(self.second, self.gate))


@register_adapter("hierarchical")
class Hierarchical(Adapter):
    """``f(z) = up(h3)``: three gated residual steps in the reduced width, between 1x1 ``down`` and ``up``.

    ``h0 = GELU(down z)``, ``h1 = h0 + g1 conv(h0)``, ``h2 = h1 + g2 attend(h1)``, ``h3 = h2 + g3 mlp(h2)``. ``up``
    starts at zero, so ``f`` does. Each gate is multiplied into the weights of its step's last layer: the result is the
    same, and no map has to be saved for the gate's gradient.

    The number of keys is bounded (``cells``), so attention's memory grows linearly with the pixels. It has no position
    encoding: the convolutions and their zero padding before it carry position.
    """

    places = ("output",)
    Options = HierarchicalOptions
    merge_refusal = "its GELU, attention and norms are not linear, so no convolution equals it"
    image_parts = "convolutions and attention"

    def __init__(self, site: Site, options: HierarchicalOptions) -> None:
        super().__init__(site, options)
        channels = site.geometry.out_channels
        width = options.rank or max(1, channels // options.reduction)
        heads = _divisor(width, options.heads)
        self.down = Filter(channels, width, 1)
        self.conv = DoubleConv(width, _divisor(width, options.conv_groups), options.gate)
        self.attention = Attention(width, heads, options.attention, options.cells, options.gate)
        self.mlp = Mlp(width, max(1, round(width * options.mlp_ratio)), options.gate)
        self.dropout = nn.Dropout(options.dropout)
        self.up = zeroed(Filter(width, channels, 1))

    @classmethod
    def refuses(cls, site: Site, options: HierarchicalOptions) -> str | None:
        """Return a refusal for channels-last outputs, or a reduction above the channels."""
        channels = site.geometry.out_channels
        if not site.geometry.linear and options.rank is None and options.reduction > channels:
            return f"reduction {options.reduction} leaves nothing of its {channels} channels"
        return super().refuses(site, options)

    def forward(self, z: Tensor) -> Tensor:
        """Return the update, shaped like ``z``."""
        hidden = F.gelu(self.down(z))
        hidden = hidden + self.conv(hidden)
        recompute = self.options.recompute and torch.is_grad_enabled() and hidden.requires_grad
        if recompute and not is_exporting():
            hidden = checkpoint(self._tokens, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = self._tokens(hidden)
        return self.up(self.dropout(hidden))

    def _tokens(self, hidden: Tensor) -> Tensor:
        """Return the map after attention and MLP, the two steps that treat pixels as tokens."""
        pixels = pixels_of(hidden)
        pixels = pixels + self.attention(pixels)
        return image_of(pixels + self.mlp(pixels))


def _gated(layer: Filter | Affine, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layer's weight and bias times ``gate``: with them it computes ``gate`` times its output."""
    assert layer.bias is not None
    return layer.weight * gate, layer.bias * gate


def _divisor(width: int, most: int) -> int:
    """Return the largest number up to ``most`` that divides ``width``."""
    return next(number for number in range(min(width, most), 0, -1) if width % number == 0)


def _to_windows(image: Tensor, side: int) -> Tensor:
    """Return an image ``(..., rows * side, columns * side, C)`` as ``(..., rows, columns, side * side, C)``."""
    return rearrange(image, "... (rows a) (columns b) c -> ... rows columns (a b) c", a=side, b=side)
