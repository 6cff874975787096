"""Low-rank updates beside a convolution: the forms that compute them, and which one costs least."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ConvGeometry
from .kernels import compose_pointwise

UpdateForm = Literal["separate", "summed", "weight"]

Pair = tuple[int, int]

_LANES = 16  # channels that kernels work on at a time: fewer cost as much

_SMALL = 1.5  # how much dearer a multiply-accumulate of a small convolution is, measured (docs/decisions/0011)

_MANY = 2  # pixels for each output channel from which on a sum of kernels is cheaper than a sum of maps, measured


class ConvArgs(NamedTuple):
    """The settings of a zero-padded convolution, in the order of ``torch.nn.functional.conv2d``."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, layer: Any) -> ConvArgs | None:
        """Return the settings of a ``Conv2d``; None for padding that differs between two sides."""
        padding = layer.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
            if padding == "same" and any(side % 2 for side in total):
                return None
            padding = (total[0] // 2, total[1] // 2) if padding == "same" else (0, 0)
        return cls(layer.stride, padding, layer.dilation, layer.groups)

    @classmethod
    def of_geometry(cls, geometry: ConvGeometry) -> ConvArgs | None:
        """Return the settings of a geometry; None where ``conv2d`` cannot express it."""
        top, bottom, left, right = geometry.padding
        plain = geometry.padding_mode == "zeros" and top == bottom >= 0 and left == right >= 0
        if not plain or geometry.transposed or geometry.linear or geometry.dynamic_kernel is not None:
            return None
        return cls(geometry.stride, (top, left), geometry.dilation, geometry.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
        """Return the gradients of the input and of the weight, or None for the ones not wanted."""
        mask = [*wanted, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, mask
        )
        return dx, dw

    def input_gradient(self, grad: Tensor, blank: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of an input of which only the shape is known (``blank``)."""
        return self.backward(grad, blank, weight, (True, False))[0]


_POINTWISE = ConvArgs((1, 1), (0, 0), (1, 1), 1)


class Factors(NamedTuple):
    """One low-rank update, or several as one: ``B(A x)``, A on the host's own kernel, B 1x1 with any scale in it.

    Attributes:
        down: A, shape ``(rank, in_per_group, kh, kw)``.
        up: B, shape ``(out, rank_per_group, 1, 1)``.
        form: to compute it in, in training mode.
    """

    down: Tensor
    up: Tensor
    form: UpdateForm

    def require_grad(self) -> bool:
        """Return whether either of them trains."""
        return self.down.requires_grad or self.up.requires_grad

    def form_for(self, x: Tensor, weight: Tensor, training: bool) -> UpdateForm:
        """Return the form for this input, the same with gradients and without, so that the bits are the same.

        Half precision would round a small update away in the sum with the weight, so it stays apart there, and where there
        are few pixels the sum is the dearer one. In eval mode nobody's choice counts but the cost.
        """
        if x.dtype not in (torch.float32, torch.float64):
            return "separate"
        if training and self.form != "summed":
            return self.form
        if x.shape[0] * x.shape[2] * x.shape[3] < _MANY * weight.shape[0]:
            return "separate"
        return "weight" if self.form == "weight" else "summed"


def stacked(factors: list[Factors]) -> Factors:
    """Return several updates of an ungrouped convolution as one of their ranks' sum."""
    if len(factors) == 1:
        return factors[0]
    down = torch.cat([factor.down for factor in factors], 0)
    up = torch.cat([factor.up for factor in factors], 1)
    return Factors(down, up, factors[0].form)


def cheapest(host: ConvGeometry, rank: int) -> UpdateForm:
    """Return the form that costs a training step less on a large map.

    Counted in multiply-accumulates for one output position, beyond what the frozen layer costs anyway. ``weight`` needs the
    gradient of a whole kernel, once; ``summed`` runs both factors twice, where a rank below the number of lanes costs as
    much as that number.
    """
    taps = host.in_per_group * host.kernel_size[0] * host.kernel_size[1]
    lanes = -(-rank // _LANES) * _LANES
    factors = 2 * lanes * (taps + host.out_per_group)
    return "weight" if host.out_channels * taps <= _SMALL * factors else "summed"


def product(down: Tensor, up: Tensor, groups: int) -> Tensor:
    """Return the one kernel of both factors."""
    return compose_pointwise(up, down, groups)


def whole_kernel(weight: Tensor, down: Tensor, up: Tensor, groups: int) -> Tensor:
    """Return the layer's kernel with the product of both factors added, in one pass over it where that can be."""
    if groups > 1 or not weight.is_contiguous():
        return weight + product(down, up, groups)
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1)).view(weight.shape)


def add_pointwise(output: Tensor, hidden: Tensor, up: Tensor, groups: int) -> Tensor:
    """Return ``output`` with a 1x1 convolution of ``hidden`` added, within the product where that can be.

    Without a graph that is in place: a node's output must not be a view, and no pass over the map is wasted.
    """
    if groups > 1 or not (output.is_contiguous() and hidden.is_contiguous() and output.numel()):
        return output + F.conv2d(hidden, up, None, groups=groups)
    count, channels = output.shape[:2]
    flat, left, right = output.view(count, channels, -1), _over_batch(up.flatten(1), count), hidden.flatten(2)
    if torch.is_grad_enabled():
        return torch.baddbmm(flat, left, right).view(output.shape)
    flat.baddbmm_(left, right)
    return output


def factor_gradients(
    grad: Tensor,
    kept: Tensor,
    remake: Callable[[Tensor], Tensor] | None,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    hidden: Tensor | None,
    conv: ConvArgs,
    form: str,
    *,
    needs_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of the input, of A and of B; the input is what ``remake``, if any, makes of the tensor kept."""
    if form == "summed":  # an input made again is let go of before its gradient, which then takes its place in memory
        d_down, d_up = _detour_gradients(grad, kept if remake is None else remake(kept), down, up, conv)
        dx = conv.input_gradient(grad, kept, whole_kernel(weight, down, up, conv.groups)) if needs_input else None
        return dx, d_down, d_up
    x = kept if remake is None else remake(kept)
    if form == "weight":
        return _through_weight(grad, x, weight, down, up, conv, needs_input)
    assert hidden is not None
    d_hidden, d_up = both_gradients(grad, hidden, up, _POINTWISE._replace(groups=conv.groups))
    if not needs_input:
        return None, _down_gradient(d_hidden, x, down, conv), d_up
    dx = conv.input_gradient(grad, x, weight)
    if _is_matrix_product(conv, d_hidden, x, down) and dx.is_contiguous():
        dx.view(*dx.shape[:2], -1).baddbmm_(_over_batch(down.flatten(1).t(), dx.shape[0]), d_hidden.flatten(2))
        return dx, _down_gradient(d_hidden, x, down, conv), d_up
    d_detour, d_down = conv.backward(d_hidden, x, down, (True, True))
    return dx.add_(d_detour), d_down, d_up


def detour(x: Tensor, down: Tensor, conv: ConvArgs) -> Tensor:
    """Return the convolution ``A x``, as a matrix product where it is one."""
    if not _is_matrix_product(conv, x, x, down):
        return F.conv2d(x, down, None, *conv)
    return torch.bmm(_over_batch(down.flatten(1), x.shape[0]), x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])


def _is_matrix_product(conv: ConvArgs, d_hidden: Tensor, x: Tensor, down: Tensor) -> bool:
    """Whether A is a matrix beside maps that lie in memory as a product needs them."""
    pointwise = conv == _POINTWISE and down.shape[2:] == (1, 1)
    return pointwise and d_hidden.is_contiguous() and x.is_contiguous() and x.numel() > 0


def both_gradients(grad: Tensor, x: Tensor, weight: Tensor, conv: ConvArgs) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution's input and weight, by matrix products where it is one."""
    if not _is_matrix_product(conv, grad, x, weight):
        return conv.backward(grad, x, weight, (True, True))
    flat, count = grad.flatten(2), grad.shape[0]
    dx = torch.bmm(_over_batch(weight.flatten(1).t(), count), flat).view(x.shape)
    return dx, torch.bmm(flat, x.flatten(2).transpose(1, 2)).sum(0).view(weight.shape)


def _down_gradient(d_hidden: Tensor, x: Tensor, down: Tensor, conv: ConvArgs) -> Tensor:
    if not _is_matrix_product(conv, d_hidden, x, down):
        return conv.backward(d_hidden, x, down, (False, True))[1]  # type: ignore[no-any-return]
    return torch.bmm(d_hidden.flatten(2), x.flatten(2).transpose(1, 2)).sum(0).view(down.shape)


def _detour_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, conv: ConvArgs) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and of B by way of A's output, which is made for them."""
    hidden = detour(x, down, conv)
    d_hidden, d_up = both_gradients(grad, hidden, up, _POINTWISE._replace(groups=conv.groups))
    return _down_gradient(d_hidden, x, down, conv), d_up


def _through_weight(
    grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, conv: ConvArgs, needs_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients by way of the whole kernel's: ``dA = B' dW``, ``dB = dW A'``."""
    dx, d_weight = conv.backward(grad, x, whole_kernel(weight, down, up, conv.groups), (needs_input, True))
    per_group = (conv.groups, -1)
    d_kernel = d_weight.flatten(1).unflatten(0, per_group)
    left, right = up.flatten(1).unflatten(0, per_group), down.flatten(1).unflatten(0, per_group)
    d_down, d_up = left.transpose(1, 2) @ d_kernel, d_kernel @ right.transpose(1, 2)
    return dx, d_down.reshape(down.shape), d_up.reshape(up.shape)


def _over_batch(matrix: Tensor, count: int) -> Tensor:
    return matrix.unsqueeze(0).expand(count, -1, -1)
