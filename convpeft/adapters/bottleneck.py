"""The bottleneck adapter: down, GELU, up, on a module's output.

Paper: Houlsby et al., Parameter-Efficient Transfer Learning, arXiv:1902.00751.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Adapter, Site
from .branches import zeroed
from .layers import Affine, Filter, StandardizeMap
from .options import AdapterOptions, positive, probability
from .registry import register_adapter


@dataclass(frozen=True)
class BottleneckOptions(AdapterOptions):
    """Options of ``bottleneck``.

    Attributes:
        reduction: the hidden width is ``channels // reduction`` (at least 1).
        rank: the hidden width itself, instead of a reduction.
        norm: normalise the hidden map: ``none``, or ``group`` (a GroupNorm of one group: all channels and pixels).
        gate: initial value of the learnable scalar g.
        dropout: dropout probability on the hidden map, in training.
    """

    reduction: int = 4
    rank: int | None = None
    norm: Literal["none", "group"] = "none"
    gate: float = 1.0
    dropout: float = 0.0

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "reduction", "rank")
        yield from probability(self, "dropout")
        if self.gate == 0:
            yield "gate must not start at 0: with the up projection at 0 too, nothing would ever learn"


@register_adapter("bottleneck")
class Bottleneck(Adapter):
    """``f(z) = g * up(GELU(norm(down z)))`` with 1x1 ``down`` and ``up``; ``up`` starts at zero, so ``f`` does.

    Reference: arXiv:1902.00751, fig. 2; the residual of the figure is the host's own output.
    """

    places = ("output",)
    Options = BottleneckOptions
    merge_refusal = "its GELU is not linear, so no convolution equals it"

    def __init__(self, site: Site, options: BottleneckOptions) -> None:
        super().__init__(site, options)
        channels = site.geometry.out_channels
        hidden = options.rank or max(1, channels // options.reduction)
        self.down = _pointwise(site, channels, hidden)
        self.norm = StandardizeMap(hidden) if options.norm == "group" else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)
        self.up = zeroed(_pointwise(site, hidden, channels))
        self.gate = nn.Parameter(torch.full((1,), options.gate))

    @classmethod
    def refuses(cls, site: Site, options: BottleneckOptions) -> str | None:
        """Return a refusal for a reduction above the channels, or the norm ``group`` on channels-last outputs."""
        if options.rank is None and options.reduction > site.geometry.out_channels:
            return f"reduction {options.reduction} leaves nothing of its {site.geometry.out_channels} channels"
        if options.norm == "group" and site.geometry.linear:
            return "norm 'group' needs an image output (N, C, H, W); its output has the channels last"
        return None

    def forward(self, z: Tensor) -> Tensor:
        """Return the update, shaped like ``z``."""
        return self.gate * self.up(self.dropout(F.gelu(self.norm(self.down(z)))))


def _pointwise(site: Site, in_channels: int, out_channels: int) -> Affine | Filter:
    if site.geometry.linear:
        return Affine(in_channels, out_channels)
    return Filter(in_channels, out_channels, 1)
