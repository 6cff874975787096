"""LoRA for convolutions and linear layers, beside a layer or on a module's output.

Papers: Hu et al., LoRA, arXiv:2106.09685; Kalajdzievski, rsLoRA, arXiv:2312.03732; Liu et al., DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..convolution.geometry import PLAIN_HOSTS
from ..convolution.kernels import Chain, ConvKernel, compose_pointwise, embed_on_grid
from ..convolution.low_rank import Factors, UpdateForm, cheapest
from ..convolution.nodes import convolve_trained
from ..errors import NotMergeable
from .base import Adapter, Host, Site, exact
from .dora import magnitude_ratio
from .options import AdapterOptions, positive, probability
from .registry import register_adapter


@dataclass(frozen=True)
class LoraOptions(AdapterOptions):
    """Options of ``lora``.

    Attributes:
        rank: r, the width of the detour. A grouped layer shares it out: ``max(1, rank // groups)`` for each group.
        alpha: the update is scaled by ``alpha / rank``; unset means ``alpha = rank``, a scale of 1.
        dropout: of the detour's input, in training.
        rslora: scale by ``alpha / sqrt(rank)`` instead.
        pointwise: A looks at the centre pixel only (1x1) instead of the layer's whole kernel.
        dora: learn the magnitude of the layer's weight apart from its direction (parallel only).
        evaluate: in training, keep A and B ``separate`` from the layer's kernel, or add their product to it and convolve
            once; then their gradients go by way of A's own output (``summed``) or of the whole kernel's gradient
            (``weight``). ``auto`` takes what costs less. The values agree but for rounding.
        detach_norm: with ``dora``, take the norm for a constant in the backward pass, as the paper proposes.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    pointwise: bool = False
    dora: bool = False
    detach_norm: bool = True
    evaluate: Literal["auto", "separate", "summed", "weight"] = "auto"

    def problems(self) -> Iterator[str]:
        """Yield what is out of range."""
        yield from positive(self, "rank", "alpha")
        yield from probability(self, "dropout")
        if not (self.dora or self.detach_norm):
            yield "detach_norm: false says something of dora only; add dora: true or leave it out"


@register_adapter("lora")
class Lora(Adapter):
    """``f(x) = (alpha / r) * B(A x)``: A has the layer's kernel, stride and padding, B is 1x1 and starts at zero.

    Groups stay groups: both factors are block-diagonal, nothing leaks from one group to another, and a depthwise
    layer's adapter is no larger than the layer. Beside a transposed convolution A is a transposed one. On a module's
    output A and B are 1x1 convolutions over its channels.

    With ``dora`` the layer's weight becomes ``W' = m V / ||V||``, ``V = W + (alpha / r) B A``, one norm and one magnitude m
    for each output channel; the bias is left alone. In terms of what the layer has computed already, without its bias,
    that adds ``f(x) = (q - 1) layer(x) + q (alpha / r) B(A x)`` with ``q = m / ||V||``: no second pass through W, and no
    gradient of W's size. Fresh, q is exactly 1 (see ``magnitude_ratio``) and B zero, so ``f`` is exactly zero. Dropout acts
    on A's input, not on the norm. Several active adapters add up, each as the difference from the bare layer.

    Reference: arXiv:2106.09685, eq. 3: ``W' = W + (alpha / r) B A``; arXiv:2402.09353, eq. 5.
    """

    places = ("parallel", "output")
    hosts = PLAIN_HOSTS
    Options = LoraOptions
    form: UpdateForm | None

    def __init__(self, site: Site, options: LoraOptions) -> None:
        super().__init__(site, options)
        host = site.geometry
        per_group = options.rank if host.groups == 1 else max(1, min(options.rank // host.groups, host.out_per_group))
        rank = per_group * host.groups
        inner = host.resized((1, 1)) if options.pointwise else host
        self.down_geometry = inner.with_channels(host.in_channels, rank)
        self.up_geometry = host.pointwise(rank, host.out_channels, host.groups)
        alpha = options.rank if options.alpha is None else options.alpha
        self.scale = alpha / (math.sqrt(options.rank) if options.rslora else options.rank)
        self.down = nn.Parameter(torch.empty(self.down_geometry.weight_shape()))
        self.up = nn.Parameter(torch.zeros(self.up_geometry.weight_shape()))
        if self._has_factors():
            self.form = cheapest(host, rank) if options.evaluate == "auto" else options.evaluate
        self.dropout = nn.Dropout(options.dropout)
        self.reads_host = options.dora
        if options.dora:
            self.magnitude = nn.Parameter(torch.zeros(host.out_channels))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @classmethod
    def refuses(cls, site: Site, options: LoraOptions) -> str | None:
        """Refuse DoRA where there is no weight to take apart."""
        if options.dora and site.place == "output":
            return "dora takes a layer's weight apart, and a module's output has none; use place: parallel on a layer"
        return None

    def forward(self, x: Tensor, host: Host | None = None, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the update, shaped like the host's output.

        Args:
            x: the host's input.
            host: read by DoRA only.
            output_size: height and width of the host's output, where that is a transposed convolution: its caller may
                have asked for one.
        """
        if host is not None:
            output_size = host.output.shape[-2:]
        if self.down_geometry.transposed:
            hidden = self.down_geometry.convolve(self.dropout(x), self.down, output_size=output_size)
        else:
            hidden = convolve_trained(self.down_geometry, self.dropout(x), self.down)
        update = convolve_trained(self.up_geometry, hidden, self.up) * self.scale
        if not self.options.dora:
            return update
        if host is None:
            raise TypeError("a DoRA adapter reads its layer: call it as adapter(x, host), as the layer itself does")
        product = self._kernel(self.down, self.up)
        ratio = magnitude_ratio(
            self.site.geometry.as_kernel(host.weight), product, self.magnitude, self.options.detach_norm
        )
        per_channel = (-1,) if self.site.geometry.linear else (-1, 1, 1)
        own = host.output if host.bias is None else host.output - host.bias.to(host.output.dtype).view(per_channel)
        ratio = ratio.view(per_channel)
        return (ratio - 1).to(update.dtype) * own + ratio.to(update.dtype) * update

    def factors(self) -> Factors | None:
        """Return A and the scaled B, unless something else comes in between: dropout, DoRA, another kernel or place."""
        if self.form is None or (self.training and self.dropout.p > 0):
            return None
        return Factors(self.down, self.up if self.scale == 1 else self.up * self.scale, self.form)

    def _has_factors(self) -> bool:
        """Whether all there is to it, but for dropout, are two factors beside a convolution."""
        host = self.site.geometry
        beside = self.site.place == "parallel" and not (host.linear or host.transposed)
        return beside and not (self.options.dora or self.options.pointwise)

    def _kernel(self, down: Tensor, up: Tensor) -> Tensor:
        """Return ``(alpha / r) B A`` as one kernel of the host's own size."""
        size = self.site.geometry.kernel_size
        product = compose_pointwise(up, down, self.site.geometry.groups) * self.scale
        return product if product.shape[2:] == size else embed_on_grid(product, size, size)

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return A, then the scaled B; for DoRA the one kernel ``W' - W``."""
        if not self.options.dora:
            return (
                ConvKernel(exact(self.down), None, self.down_geometry),
                ConvKernel(exact(self.up) * self.scale, None, self.up_geometry),
            )
        if host is None:
            raise NotMergeable("dora has no kernel of its own: it depends on the layer's weight, chain(host)")
        product = self._kernel(exact(self.down), exact(self.up))
        ratio = magnitude_ratio(host.weight, product, exact(self.magnitude)).view(-1, 1, 1, 1)
        return (ConvKernel((ratio - 1) * host.weight + ratio * product, None, host.geometry),)
