"""Autograd nodes of frozen layers that save less for backward: same values and gradients, less memory and time.

torch's convolution saves its input for backward even when its weight is frozen, and so does an eval-mode BatchNorm.
Here a frozen convolution saves its weight only and a frozen norm its scale; low-rank updates of a convolution run in
the same autograd node, which adds them in place. Under compilers, tracers and functional transforms ``is_eager`` is
False and torch's own operations run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import ConvGeometry
from .low_rank import (
    ConvArgs,
    Factors,
    add_pointwise,
    both_gradients,
    conv_or_matmul,
    factor_gradients,
    gradients_by_kernel,
    whole_kernel,
)
from .origins import Origin, Recall, origin_of
from .precision import autocast_dtype, in_dtype, without_autocast

# torch 2.1 has the latter
is_compiling: Any = getattr(torch.compiler, "is_compiling", None) or getattr(
    torch._utils, "is_compiling", lambda: False
)


_is_exporting: Any = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7 or so has it


def is_exporting() -> bool:
    """Return whether the model is being traced or exported: what runs now will be run on inputs of other sizes."""
    return torch.jit.is_tracing() or _is_exporting()


def is_eager() -> bool:
    """Return whether operations run eagerly under autograd alone: no compiling, tracing, functorch or forward mode."""
    if is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return torch.autograd.forward_ad._current_level < 0


def serves(module_class: type) -> bool:
    """Return whether a class's forward is the plain convolution or norm that this module can compute instead."""
    return is_convolution(module_class) or is_norm(module_class)


def is_convolution(module_class: type) -> bool:
    """Return whether a class is a ``Conv2d`` with torch's own forward; its constructor may be another one."""
    if not issubclass(module_class, nn.Conv2d) or _computes_tensors(module_class):
        return False
    return module_class.forward is nn.Conv2d.forward and module_class._conv_forward is nn.Conv2d._conv_forward


def is_norm(module_class: type) -> bool:
    """Return whether a class's forward is that of a BatchNorm of torch."""
    forward = getattr(module_class, "forward", None)
    is_one = forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
    return is_one and not _computes_tensors(module_class)


def _computes_tensors(module_class: type) -> bool:
    """Return whether a class defines one of its tensors itself, as a property that computes it, say."""
    return any(hasattr(module_class, name) for name in ("weight", "bias", "running_mean", "running_var"))


def _holds_plainly(layer: Any) -> bool:
    """Return whether a layer's weight and bias are what it is registered with, so that nothing computes them."""
    own, other = (
        layer._parameters,
        layer.__dict__,
    )  # a tensor computed by a hook or a parametrisation is not in the first
    return "weight" in own and "bias" in own and "weight" not in other and "bias" not in other


def convolve(layer: Any, x: Any, factors: Factors | None, lean: bool) -> Tensor | None:
    """Return the output of a ``Conv2d`` with its low-rank updates added, or None: then the caller runs torch's forward.

    The computation depends neither on gradients nor on ``lean``, so the bits do not either.

    Args:
        layer: a ``Conv2d``; None is returned unless it is zero-padded and its weight a plain parameter.
        x: the input; None is returned unless its shape is ``(N, in, H, W)``.
        factors: the low-rank updates to add, or None.
        lean: do not save the input of a frozen layer if backward does not need it or can recompute it.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or layer.padding_mode != "zeros" or not _holds_plainly(layer):
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if not is_compiling() and (type(x) not in (Tensor, nn.Parameter) or type(weight) is not nn.Parameter):
        return None
    conv, dtype = ConvArgs.of(layer), autocast_dtype(x)
    if conv is None or (dtype is None and weight.dtype != x.dtype):  # torch raises the error for unequal dtypes
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
        down, up = factors.down.to(x.dtype), factors.up.to(x.dtype)
        if is_exporting():  # no form by size, and no operations but convolutions, which every runtime has
            return _beside(F.conv2d(x, weight.to(x.dtype), in_dtype(bias, x.dtype), *conv), x, down, up, conv)
        form = factors.form_for(x, weight, layer.training)
        # torch's own backward of "summed" would compute the gradient of the whole kernel
        form = "separate" if form == "summed" and layer.training and not eager else form
    if not own_node:
        return _forward(x, weight, bias, down, up, conv, form)[0]
    origin = origin_of(x) if lean and down is not None else None
    return _Convolution.apply(x, weight, bias, down, up, _Settings(conv, form, origin))


def _beside(output: Tensor, x: Tensor, down: Tensor, up: Tensor, conv: ConvArgs) -> Tensor:
    """Return an output with a low-rank update added, by two convolutions and a sum."""
    return output + F.conv2d(F.conv2d(x, down, None, *conv), up, None, groups=conv.groups)


def convolve_trained(geometry: ConvGeometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``geometry.convolve(x, weight)`` for a trainable weight, as a matrix product if it is one.

    If ``x`` can be recomputed from what the activation before it saved, then ``x`` itself is not saved for backward.

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
    return conv_or_matmul(x, weight, conv) if origin is None else _Trained.apply(x, weight, conv, origin)


class _Trained(torch.autograd.Function):
    """A convolution with a trainable weight that saves the origin of its input for backward, not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: ConvArgs, origin: Origin) -> Tensor:
        ctx.save_for_backward(origin.source, weight)
        ctx.conv, ctx.recall = conv, Recall(x, origin)
        return conv_or_matmul(x, weight, conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved, weight = ctx.saved_tensors
        with without_autocast(grad):
            x = ctx.recall.input(saved)
            if torch.is_grad_enabled() or is_batched(grad):
                return *ctx.conv.backward(grad, x, weight, (True, True)), None, None
            return *both_gradients(grad, x, weight, ctx.conv), None, None


def is_batched(grad: Tensor) -> bool:
    """Return whether a gradient is a batch of gradients (``vmap`` or ``is_grads_batched``): nothing in place then."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


class _Settings(NamedTuple):
    """The arguments of a convolution's autograd node that are not tensors."""

    conv: ConvArgs
    form: str
    origin: Origin | None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None, conv: ConvArgs, form: str
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and ``A x`` if the form is ``separate``."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if down is None or up is None:
        return F.conv2d(x, weight, bias, *conv), None
    if form != "separate":
        return F.conv2d(x, whole_kernel(weight, down, up, conv.groups), bias, *conv), None
    output, hidden = F.conv2d(x, weight, bias, *conv), conv_or_matmul(x, down, conv)
    return add_pointwise(output, hidden, up, conv.groups), hidden


class _Convolution(torch.autograd.Function):
    """A frozen convolution with low-rank updates; it saves its input only if a factor's gradient needs it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, down: Tensor | None, up: Tensor | None, settings: _Settings
    ) -> Tensor:
        conv, form, origin = settings
        output, hidden = _forward(x, weight, bias, down, up, conv, form)
        saved = None if down is None else x if origin is None else origin.source
        ctx.save_for_backward(saved, weight, bias, down, up, hidden)
        ctx.conv, ctx.form, ctx.blank, ctx.recall = conv, form, ShapeOnly.like(x), Recall(x, origin)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        with without_autocast(grad):
            dx, d_down, d_up = _gradients(ctx, grad, *ctx.saved_tensors)
        return dx, None, None, d_down, d_up, None


def _gradients(
    ctx: Any, grad: Tensor, saved: Any, weight: Tensor, _: Any, down: Any, up: Any, hidden: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a convolution's input and of its two factors, from what its node saved."""
    conv, weight, needs_input = ctx.conv, weight.to(grad.dtype), ctx.needs_input_grad[0]
    if down is None:
        return conv.input_gradient(grad, ctx.blank.tensor(grad), weight), None, None
    remake, form = ctx.recall.remake, ctx.form
    if torch.is_grad_enabled() or is_batched(grad):
        return gradients_by_kernel(grad, ctx.recall.input(saved), weight, down, up, conv, needs_input)
    return factor_gradients(grad, saved, remake, weight, down, up, hidden, conv, form, needs_input=needs_input)


class ShapeOnly(NamedTuple):
    """The shape and memory format of an input that was not saved: all that its gradient needs of it."""

    shape: torch.Size
    channels_last: bool

    @classmethod
    def like(cls, x: Tensor) -> ShapeOnly:
        """Return the shape and memory format of ``x``."""
        return cls(x.shape, x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())

    def tensor(self, grad: Tensor) -> Tensor:
        """Return an uninitialised tensor of this shape and format, with the dtype and device of ``grad``."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(self.shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


def normalise(layer: Any, x: Any) -> Tensor | None:
    """Return the output of a frozen BatchNorm in eval mode, or None: then the caller runs torch's forward."""
    if layer.training or not is_eager() or type(x) is not Tensor or not (x.requires_grad and torch.is_grad_enabled()):
        return None
    own, statistics = layer._parameters, layer._buffers
    if not _holds_plainly(layer) or "running_mean" not in statistics or "running_var" not in statistics:
        return None
    mean, variance = statistics["running_mean"], statistics["running_var"]
    tensors = (own["weight"], own["bias"], mean, variance)
    if mean is None or variance is None or any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return None
    layer._check_input_dim(x)
    return _Norm.apply(x, own["weight"], own["bias"], mean, variance, layer.eps)


class _Norm(torch.autograd.Function):
    """A frozen norm with running statistics: a scale and a shift, of which backward needs only the scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(weight, variance)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, variance = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shape = (-1, *(1,) * (grad.ndim - 2))
        return grad * scale.to(grad.dtype).view(shape), *(None,) * 5
