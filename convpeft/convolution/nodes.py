"""Frozen layers that keep for backward only what is needed: the same values and gradients, less memory and time.

torch's convolution keeps its input for the gradient of a weight that is frozen, and an eval-mode norm keeps its own. Here
a frozen convolution keeps its weight alone, a frozen norm its scale, and low-rank updates beside a convolution run in
the same autograd node, which adds them up in place. Where something else looks at the graph (compilers, tracers,
functional transforms) ``is_eager`` says no, and torch's own operations run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import ConvGeometry
from .low_rank import ConvArgs, Factors, add_pointwise, both_gradients, detour, factor_gradients, whole_kernel
from .origins import Origin, origin_of

_compiling: Any = getattr(torch.compiler, "is_compiling", None) or getattr(torch._utils, "is_compiling", lambda: False)


def is_eager() -> bool:
    """Return whether operations run as they are written, watched by nothing but autograd."""
    if _compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return torch.autograd.forward_ad._current_level < 0


def serves(module_class: type) -> bool:
    """Return whether a class's forward is the plain convolution or norm that this module can run in its place."""
    return is_convolution(module_class) or is_norm(module_class)


def is_convolution(module_class: type) -> bool:
    """Return whether a class convolves as ``Conv2d`` itself does, subclasses with another constructor included."""
    if not issubclass(module_class, nn.Conv2d):
        return False
    return module_class.forward is nn.Conv2d.forward and module_class._conv_forward is nn.Conv2d._conv_forward


def is_norm(module_class: type) -> bool:
    """Return whether a class normalises as torch's BatchNorms do."""
    forward = getattr(module_class, "forward", None)
    return forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def convolve(layer: Any, x: Any, factors: Factors | None, lean: bool) -> Tensor | None:
    """Return what a ``Conv2d`` makes of ``x``, low-rank updates included; None where torch's own forward does as well.

    What it computes depends neither on gradients nor on ``lean``, so the bits do not either.

    Args:
        layer: zero-padded, with a plain weight; any other gives None.
        x: ``(N, in, H, W)``; anything else gives None.
        factors: of the updates beside it, or None.
        lean: keep no input of a frozen layer that is not needed or can be made again.
    """
    own = layer._parameters  # what is computed by a hook or a parametrisation is not among them
    if (
        not isinstance(x, Tensor)
        or x.ndim != 4
        or layer.padding_mode != "zeros"
        or not {"weight", "bias"} <= own.keys()
    ):
        return None
    weight, bias = own["weight"], own["bias"]
    if not _compiling() and (type(x) not in (Tensor, nn.Parameter) or type(weight) is not nn.Parameter):
        return None
    conv, dtype = ConvArgs.of(layer), autocast_dtype(x)
    if conv is None or (dtype is None and weight.dtype != x.dtype):  # of the latter torch says what is wrong
        return None
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    trains = torch.is_grad_enabled() and (x.requires_grad or (factors is not None and factors.require_grad()))
    eager = is_eager()
    own_node = frozen and trains and eager and (lean or factors is not None)
    if factors is None and not own_node:
        return None
    x = x if dtype is None else x.to(dtype)
    down, up, form = None, None, "separate"
    if factors is not None:
        down, up, form = factors.down.to(x.dtype), factors.up.to(x.dtype), factors.form_for(x, weight, layer.training)
        if (
            form == "summed" and layer.training and not eager
        ):  # torch's own backward would want the whole kernel's gradient
            form = "separate"
    if not own_node:
        return _forward(x, weight, bias, down, up, conv, form)[0]
    origin = origin_of(x) if lean and down is not None else None
    return _Convolution.apply(x, weight, bias, down, up, _How(conv, form, origin))


def convolve_trained(geometry: ConvGeometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``geometry.convolve(x, weight)`` for a weight that trains, as a matrix product where it is one.

    Keeps what ``x`` can be made from instead of ``x``, if that is kept anyway.

    Args:
        geometry: of an adapter's own convolution.
        x: its input.
        weight: shape ``geometry.weight_shape()``.
    """
    if not is_eager() or type(x) is not Tensor or x.ndim != 4:
        return geometry.convolve(x, weight)
    conv, dtype = ConvArgs.of_geometry(geometry), autocast_dtype(x)
    if conv is None or x.dtype != (weight.dtype if dtype is None else dtype):
        return geometry.convolve(x, weight)
    origin = origin_of(x) if torch.is_grad_enabled() and weight.requires_grad else None
    weight = weight.to(x.dtype)
    return detour(x, weight, conv) if origin is None else _Trained.apply(x, weight, conv, origin)


class _Trained(torch.autograd.Function):
    """A convolution whose weight trains; it keeps the origin of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: ConvArgs, origin: Origin) -> Tensor:
        """Return the convolution."""
        ctx.save_for_backward(origin.source, weight)
        ctx.conv, ctx.remake = conv, origin.remake
        return detour(x, weight, conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return both gradients."""
        source, weight = ctx.saved_tensors
        return *both_gradients(grad, ctx.remake(source), weight, ctx.conv), None, None


class _How(NamedTuple):
    """What a convolution's autograd node is told beside its tensors."""

    conv: ConvArgs
    form: str
    origin: Origin | None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, conv: ConvArgs, form: str
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and the map between the two factors where there is one."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if down is None or up is None:
        return F.conv2d(x, weight, bias, *conv), None
    if form != "separate":
        return F.conv2d(x, whole_kernel(weight, down, up, conv.groups), bias, *conv), None
    output, hidden = F.conv2d(x, weight, bias, *conv), detour(x, down, conv)
    return add_pointwise(output, hidden, up, conv.groups), hidden


class _Convolution(torch.autograd.Function):
    """A frozen convolution with low-rank updates; keeps no input unless a factor's gradient needs it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, how: _How
    ) -> Tensor:
        """Return the output; see ``convolve``."""
        output, hidden = _forward(x, weight, bias, down, up, how.conv, how.form)
        kept = None if down is None else x if how.origin is None else how.origin.source
        ctx.save_for_backward(kept, weight, bias, down, up, hidden)
        ctx.how, ctx.blank = how, ShapeOnly.like(x)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the input and of both factors."""
        if grad is None:
            return (None,) * 6
        kept, weight, bias, down, up, hidden = ctx.saved_tensors
        how: _How = ctx.how
        remake = None if how.origin is None else how.origin.remake
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: torch's own operations have one
            x = kept if kept is None or remake is None else remake(kept)
            return _differentiable(ctx, x, weight, bias, down, up, grad)
        weight = weight.to(grad.dtype)
        if down is None:
            return how.conv.input_gradient(grad, ctx.blank.tensor(grad), weight), *(None,) * 5
        dx, d_down, d_up = factor_gradients(
            grad, kept, remake, weight, down, up, hidden, how.conv, how.form, needs_input=ctx.needs_input_grad[0]
        )
        return dx, None, None, d_down, d_up, None


def _differentiable(
    ctx: Any, x: Tensor | None, weight: Tensor, bias: Any, down: Any, up: Any, grad: Tensor
) -> tuple[Any, ...]:
    """Return the gradients as torch's own operations give them, with a graph of their own."""
    conv = ctx.how.conv
    if x is None:
        return conv.input_gradient(grad, ctx.blank.tensor(grad), weight.to(grad.dtype)), *(None,) * 5
    output = F.conv2d(x, whole_kernel(weight.to(x.dtype), down, up, conv.groups), None, *conv)
    wanted = [tensor for tensor, needed in ((x, ctx.needs_input_grad[0]), (down, True), (up, True)) if needed]
    *dx, d_down, d_up = torch.autograd.grad(output, wanted, grad, create_graph=True)
    return dx[0] if dx else None, None, None, d_down, d_up, None


class ShapeOnly(NamedTuple):
    """Shape and memory format of an input that was not kept; torch asks for such a tensor and reads no number of it."""

    shape: torch.Size
    channels_last: bool

    @classmethod
    def like(cls, x: Tensor) -> ShapeOnly:
        """Return the shape and format of ``x``."""
        return cls(x.shape, x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())

    def tensor(self, grad: Tensor) -> Tensor:
        """Return a tensor of this shape, in the dtype and on the device of ``grad``; its numbers are whatever was there."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(self.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def normalise(layer: Any, x: Any) -> Tensor | None:
    """Return what a frozen BatchNorm in eval mode makes of ``x``; None where torch's own path must run."""
    if layer.training or not is_eager() or type(x) is not Tensor or not (x.requires_grad and torch.is_grad_enabled()):
        return None
    affine = [parameter for parameter in layer._parameters.values() if parameter is not None]
    if layer._buffers.get("running_mean") is None or any(p.requires_grad for p in affine):
        return None
    layer._check_input_dim(x)
    mean, variance = layer.running_mean, layer.running_var
    return _Norm.apply(x, layer.weight, layer.bias, mean, variance, layer.eps)


class _Norm(torch.autograd.Function):
    """A frozen norm on running statistics: a scale and a shift, of which backward needs the scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        """Return the normalised map, as torch computes it."""
        ctx.save_for_backward(weight, variance)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the scaled gradient."""
        weight, variance = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shape = (-1, *(1,) * (grad.ndim - 2))
        return grad * scale.to(grad.dtype).view(shape), *(None,) * 5


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype autocast runs a convolution of ``x`` in, or None where it is off or leaves ``x`` alone."""
    kind = x.device.type
    if x.dtype == torch.float64:
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if kind == "cuda" and torch.is_autocast_enabled() else None
