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
from .base import Adapter, Entrance, Host, Site, exact
from .branches import shared_rank
from .dora import magnitude_ratio
from .options import AdapterOptions, positive, probability
from .registry import register_adapter


@dataclass(frozen=True)
class LoraOptions(AdapterOptions):
    """Options of ``lora``.

    Attributes:
        rank: r, the hidden channels; a grouped layer gets ``max(1, rank // groups)`` per group.
        alpha: the update is scaled by ``alpha / rank``; unset means ``alpha = rank``, a scale of 1.
        dropout: dropout probability on the update's input, in training.
        rslora: scale by ``alpha / sqrt(rank)`` instead.
        pointwise: A is 1x1, at the centre of the layer's kernel, instead of the whole kernel.
        dora: learn the magnitude of the layer's weight and its direction separately (parallel only).
        detach_norm: with ``dora``, treat the norm as a constant in backward, as the paper proposes.
        evaluate: how to compute the update in training: ``separate`` runs A and B beside the layer; the others add
            ``B A`` to the layer's kernel and convolve once, with the gradients of A and B by way of ``A x``
            (``summed``) or of the whole kernel's gradient (``weight``). ``auto`` takes the cheaper of the last two.
            All give the same values up to rounding.
        bias: learn a change of the layer's bias too; it is neither scaled nor dropped, and a form other than ``separate``
            is not taken.
    """

    later = ("bias",)

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    pointwise: bool = False
    dora: bool = False
    detach_norm: bool = True
    evaluate: Literal["auto", "separate", "summed", "weight"] = "auto"
    bias: bool = False

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range."""
        yield from positive(self, "rank", "alpha")
        yield from probability(self, "dropout")
        if not (self.dora or self.detach_norm):
            yield "detach_norm: false says something of dora only; add dora: true or leave it out"
        if self.bias and self.evaluate in ("summed", "weight"):
            yield f"evaluate: {self.evaluate} computes a kernel, and bias: true adds to no kernel; leave evaluate out"


@register_adapter("lora")
class Lora(Adapter):
    """``f(x) = (alpha / r) * B(A x)``: A has the layer's kernel, stride and padding, B is 1x1 and starts at zero.

    A and B have the layer's groups (both are block-diagonal), so a depthwise layer's adapter is no larger than the
    layer. Beside a transposed convolution A is transposed too. On a module's output A and B are 1x1 over its channels.

    With ``dora`` the layer's weight becomes ``W' = m V / ||V||``, ``V = W + (alpha / r) B A``, with one norm and one
    magnitude m for each output channel; the bias is unchanged. With ``layer(x)`` the layer's own output minus its bias,
    ``f(x) = (q - 1) layer(x) + q (alpha / r) B(A x)``, ``q = m / ||V||``: W is neither convolved nor differentiated a
    second time. In a fresh adapter q is exactly 1 (see ``magnitude_ratio``) and B zero, so ``f`` is
    exactly zero. Dropout acts on A's input, not on the norm. Active adapters add up, each as its difference from the
    bare layer.

    Reference: arXiv:2106.09685, eq. 3: ``W' = W + (alpha / r) B A``; arXiv:2402.09353, eq. 5.
    """

    places = ("parallel", "output")
    hosts = PLAIN_HOSTS
    Options = LoraOptions
    form: UpdateForm | None

    def __init__(self, site: Site, options: LoraOptions) -> None:
        super().__init__(site, options)
        host = site.geometry
        rank = shared_rank(host, options.rank)
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
        self.bias = nn.Parameter(torch.zeros(host.out_channels)) if options.bias else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @classmethod
    def refuses(cls, site: Site, options: LoraOptions) -> str | None:
        """Return why DoRA is refused on a module's output: it has no weight."""
        if options.dora and site.place == "output":
            return "dora takes a layer's weight apart, and a module's output has none; use place: parallel on a layer"
        return None

    def forward(self, x: Tensor, host: Host | None = None, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the update, shaped like the host's output.

        Args:
            x: the host's input.
            host: the host's tensors, needed by DoRA only.
            output_size: height and width of the output of a transposed host, which its caller may choose.
        """
        if host is not None:
            output_size = host.output.shape[-2:]
        if self.down_geometry.transposed:
            hidden = self.down_geometry.convolve(self.dropout(x), self.down, output_size=output_size)
        else:
            hidden = convolve_trained(self.down_geometry, self.dropout(x), self.down)
        update = convolve_trained(self.up_geometry, hidden, self.up) * self.scale
        per_channel = (-1,) if self.site.geometry.linear else (-1, 1, 1)
        if self.bias is not None:
            shift = self.bias.to(update.dtype).view(per_channel)
        if not self.options.dora:
            return update if self.bias is None else update + shift
        if host is None:
            raise TypeError("a DoRA adapter reads its layer: call it as adapter(x, host), as the layer itself does")
        product = self._kernel(self.down, self.up)
        weight = self.site.geometry.as_kernel(host.weight)
        ratio = magnitude_ratio(weight, product, self.magnitude, self.options.detach_norm)
        own = host.output if host.bias is None else host.output - host.bias.to(host.output.dtype).view(per_channel)
        ratio = ratio.view(per_channel)
        changed = (ratio - 1).to(update.dtype) * own + ratio.to(update.dtype) * update
        return changed if self.bias is None else changed + shift

    def entrance(self) -> Entrance | None:
        """Return A, or None beside a transposed convolution."""
        if self.site.geometry.transposed:
            return None
        return Entrance(self.down, "centre" if self.options.pointwise else "kernel")

    def factors(self) -> Factors | None:
        """Return A and the scaled B; None with dropout, DoRA, ``pointwise``, ``bias``, or a host that is no plain convolution."""
        if self.form is None or (self.training and self.dropout.p > 0):
            return None
        return Factors(self.down, self.up if self.scale == 1 else self.up * self.scale, self.form)

    def _has_factors(self) -> bool:
        """Return whether the update, apart from dropout, is two factors beside a plain convolution."""
        host = self.site.geometry
        plain = self.site.place == "parallel" and not (host.linear or host.transposed)
        return plain and not (self.options.dora or self.options.pointwise or self.options.bias)

    def _kernel(self, down: Tensor, up: Tensor) -> Tensor:
        """Return ``(alpha / r) B A`` as one kernel of the host's kernel size."""
        size = self.site.geometry.kernel_size
        product = compose_pointwise(up, down, self.site.geometry.groups) * self.scale
        return product if product.shape[2:] == size else embed_on_grid(product, size, size)

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return A, then the scaled B; for DoRA the one kernel ``W' - W``. The last step has the bias, if there is one."""
        bias = None if self.bias is None else exact(self.bias)
        if not self.options.dora:
            return (
                ConvKernel(exact(self.down), None, self.down_geometry),
                ConvKernel(exact(self.up) * self.scale, bias, self.up_geometry),
            )
        if host is None:
            raise NotMergeable("dora has no kernel of its own: it depends on the layer's weight, chain(host)")
        product = self._kernel(exact(self.down), exact(self.up))
        ratio = magnitude_ratio(host.weight, product, exact(self.magnitude)).view(-1, 1, 1, 1)
        return (ConvKernel((ratio - 1) * host.weight + ratio * product, bias, host.geometry),)
