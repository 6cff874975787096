"""Low-rank updates added to a convolution: the forms that compute them, their gradients, and the cheapest form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ConvGeometry, Pair, padding_sides
from .kernels import compose_pointwise

UpdateForm = Literal["separate", "summed", "weight"]

_LANES = 16  # channels a convolution kernel processes at a time: a smaller rank costs as much as this one

_SMALL = 1.5  # cost of a multiply-accumulate in a small convolution relative to a large one (docs/decisions/0011)

_MANY = 2  # pixels per output channel above which adding kernels is cheaper than adding maps, measured


class ConvArgs(NamedTuple):
    """The settings of a zero-padded convolution, in the argument order of ``torch.nn.functional.conv2d``."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(cls, layer: Any) -> ConvArgs | None:
        """Return the settings of a ``Conv2d``, or None if its padding differs between two opposite sides."""
        top, bottom, left, right = padding_sides(layer.padding, layer.kernel_size, layer.dilation)
        return cls(layer.stride, (top, left), layer.dilation, layer.groups) if top == bottom and left == right else None

    @classmethod
    def of_geometry(cls, geometry: ConvGeometry) -> ConvArgs | None:
        """Return the settings of a geometry, or None if ``conv2d`` cannot express it."""
        top, bottom, left, right = geometry.padding
        plain = geometry.padding_mode == "zeros" and top == bottom >= 0 and left == right >= 0
        if not plain or geometry.transposed or geometry.linear or geometry.dynamic_kernel is not None:
            return None
        return cls(geometry.stride, (top, left), geometry.dilation, geometry.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
        """Return the gradients of the input and of the weight; None for one that is not wanted."""
        settings = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *settings, [*wanted, False])
        return dx, dw

    def input_gradient(self, grad: Tensor, blank: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input, of which only the shape is needed (``blank``)."""
        return self.backward(grad, blank, weight, (True, False))[0]


_POINTWISE = ConvArgs((1, 1), (0, 0), (1, 1), 1)


class Factors(NamedTuple):
    """The two factors of a low-rank update ``B(A x)``: A has the host's kernel size, B is 1x1 and includes any scale.

    Attributes:
        down: A, shape ``(rank, in_per_group, kh, kw)``.
        up: B, shape ``(out, rank_per_group, 1, 1)``.
        form: how to compute the update in training mode.
    """

    down: Tensor
    up: Tensor
    form: UpdateForm

    def require_grad(self) -> bool:
        """Return whether A or B requires a gradient."""
        return self.down.requires_grad or self.up.requires_grad

    def form_for(self, x: Tensor, weight: Tensor, training: bool) -> UpdateForm:
        """Return the form to compute the update of ``x`` in; it does not depend on gradients, so neither do the bits.

        Half precision always takes ``separate``: in the sum with the weight a small update would be rounded away. So
        do inputs with few pixels, for which adding the kernels costs more. In eval mode only the cost decides.
        """
        if x.dtype not in (torch.float32, torch.float64):
            return "separate"
        if training and self.form != "summed":
            return self.form
        if x.shape[0] * x.shape[2] * x.shape[3] < _MANY * weight.shape[0]:
            return "separate"
        return "weight" if self.form == "weight" else "summed"


def stacked(factors: list[Factors]) -> Factors:
    """Return several updates of an ungrouped convolution as one, whose rank is the sum of theirs."""
    if len(factors) == 1:
        return factors[0]
    down = torch.cat([factor.down for factor in factors], 0)
    up = torch.cat([factor.up for factor in factors], 1)
    return Factors(down, up, factors[0].form)


def cheapest(host: ConvGeometry, rank: int) -> UpdateForm:
    """Return the form, ``weight`` or ``summed``, with the cheaper training step on a large map.

    The cost is counted in multiply-accumulates per output position, on top of the frozen layer's own. ``weight``
    computes the gradient of the whole kernel once; ``summed`` runs both factors twice, their rank rounded up to a
    multiple of ``_LANES``.
    """
    taps = host.in_per_group * host.kernel_size[0] * host.kernel_size[1]
    lanes = -(-rank // _LANES) * _LANES
    factors = 2 * lanes * (taps + host.out_per_group)
    return "weight" if host.out_channels * taps <= _SMALL * factors else "summed"


def whole_kernel(weight: Tensor, down: Tensor, up: Tensor, groups: int) -> Tensor:
    """Return ``W + B A``, in one pass over W if W is contiguous and has no groups."""
    if groups > 1 or not weight.is_contiguous():
        return weight + compose_pointwise(up, down, groups)
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1)).view(weight.shape)


def add_pointwise(output: Tensor, hidden: Tensor, up: Tensor, groups: int) -> Tensor:
    """Return ``output`` plus the 1x1 convolution of ``hidden`` with ``up``.

    If the maps are contiguous and there are no groups, the matrix product adds them. Without gradients it writes to
    ``output`` in place, which saves a pass over the map and returns no view, as an autograd node requires.
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
    grad: Tensor, saved: Tensor, remake: Callable[[Tensor], Tensor] | None, weight: Tensor, down: Tensor, up: Tensor,
    hidden: Tensor | None, conv: ConvArgs, form: str, *, needs_input: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the input (None unless ``needs_input``), of A (``down``) and of B (``up``).

    Args:
        saved: the tensor saved for backward: the input itself, or what ``remake`` recomputes the input from.
        remake: recomputes the input from ``saved``; None if ``saved`` is the input.
        hidden: ``A x``, which only the form ``separate`` saves.
        form: the one that was used in forward.
    """
    if form == "summed":  # a recomputed input is freed before its gradient is allocated, to lower the memory peak
        d_down, d_up = _summed_gradients(grad, saved if remake is None else remake(saved), down, up, conv)
        dx = conv.input_gradient(grad, saved, whole_kernel(weight, down, up, conv.groups)) if needs_input else None
        return dx, d_down, d_up
    x = saved if remake is None else remake(saved)
    if form == "weight":
        return gradients_by_kernel(grad, x, weight, down, up, conv, needs_input)
    assert hidden is not None
    d_hidden, d_up = both_gradients(grad, hidden, up, _POINTWISE._replace(groups=conv.groups))
    if not needs_input:
        return None, _down_gradient(d_hidden, x, down, conv), d_up
    dx = conv.input_gradient(grad, x, weight)
    if _is_matrix_product(conv, d_hidden, x, down) and dx.is_contiguous():
        dx.view(*dx.shape[:2], -1).baddbmm_(_over_batch(down.flatten(1).t(), dx.shape[0]), d_hidden.flatten(2))
        return dx, _down_gradient(d_hidden, x, down, conv), d_up
    dx_update, d_down = conv.backward(d_hidden, x, down, (True, True))
    return dx.add_(dx_update), d_down, d_up


def conv_or_matmul(x: Tensor, weight: Tensor, conv: ConvArgs) -> Tensor:
    """Return the convolution of ``x``, as a matrix product if it is pointwise and ``x`` contiguous."""
    if not _is_matrix_product(conv, x, x, weight):
        return F.conv2d(x, weight, None, *conv)
    return torch.bmm(_over_batch(weight.flatten(1), x.shape[0]), x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])


def _is_matrix_product(conv: ConvArgs, y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Return whether ``y = conv(x)`` is a matrix product: pointwise, both maps contiguous and not empty."""
    pointwise = conv == _POINTWISE and weight.shape[2:] == (1, 1)
    return pointwise and y.is_contiguous() and x.is_contiguous() and x.numel() > 0


def both_gradients(grad: Tensor, x: Tensor, weight: Tensor, conv: ConvArgs) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution's input and weight, by matrix products if it is one."""
    if not _is_matrix_product(conv, grad, x, weight):
        return conv.backward(grad, x, weight, (True, True))
    flat, count = grad.flatten(2), grad.shape[0]
    dx = torch.bmm(_over_batch(weight.flatten(1).t(), count), flat).view(x.shape)
    return dx, torch.bmm(flat, x.flatten(2).transpose(1, 2)).sum(0).view(weight.shape)


def _down_gradient(d_hidden: Tensor, x: Tensor, down: Tensor, conv: ConvArgs) -> Tensor:
    if not _is_matrix_product(conv, d_hidden, x, down):
        return conv.backward(d_hidden, x, down, (False, True))[1]  # type: ignore[no-any-return]
    return torch.bmm(d_hidden.flatten(2), x.flatten(2).transpose(1, 2)).sum(0).view(down.shape)


def _summed_gradients(grad: Tensor, x: Tensor, down: Tensor, up: Tensor, conv: ConvArgs) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and of B by way of ``A x``, which is recomputed here."""
    hidden = conv_or_matmul(x, down, conv)
    d_hidden, d_up = both_gradients(grad, hidden, up, _POINTWISE._replace(groups=conv.groups))
    return _down_gradient(d_hidden, x, down, conv), d_up


def gradients_by_kernel(
    grad: Tensor, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, conv: ConvArgs, needs_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of the input, A and B by way of the whole kernel's: ``dA = B' dW``, ``dB = dW A'``.

    Nothing is written in place, and no memory format is looked at, so the gradients can be differentiated again, and
    ``grad`` may be a batch of gradients (``vmap``).
    """
    dx, d_weight = conv.backward(grad, x, whole_kernel(weight, down, up, conv.groups), (needs_input, True))
    d_kernel, left, right = (
        kernel.reshape(conv.groups, shape[0] // conv.groups, -1)
        for kernel, shape in ((d_weight, weight.shape), (up, up.shape), (down, down.shape))
    )
    d_down, d_up = torch.bmm(left.transpose(1, 2), d_kernel), torch.bmm(d_kernel, right.transpose(1, 2))
    return dx, d_down.reshape(down.shape), d_up.reshape(up.shape)


def _over_batch(matrix: Tensor, count: int) -> Tensor:
    return matrix.unsqueeze(0).expand(count, -1, -1)
