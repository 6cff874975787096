"""Build peft's own layers without a model, and compute the change they make to a weight that is passed in."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...convolution.geometry import ConvGeometry
from ...errors import OptionError
from ..layers import Affine, Filter

_OWN_CLASSES: dict[type, type] = {nn.Linear: Affine, nn.Conv2d: Filter}
ADAPTER = "default"  # the name peft gives the one adapter in each layer


class Change(NamedTuple):
    """What a method adds to a layer's tensors: ``W' - W``, and ``b' - b`` (None if the bias is unchanged)."""

    weight: Tensor
    bias: Tensor | None


@cache
def peft_types() -> dict[str, Any]:
    """Return the configuration class of each method of the installed peft that wraps layers, by the method's name.

    Raises:
        OptionError: if peft is not installed, or too old.
    """
    try:
        import peft
        from peft import mapping
        from peft.tuners.tuners_utils import BaseTuner
    except ImportError as error:
        raise OptionError(f"kinds 'peft:<method>' need the package peft, which cannot be imported: {error}") from error
    if not (hasattr(mapping, "PEFT_TYPE_TO_CONFIG_MAPPING") and hasattr(mapping, "PEFT_TYPE_TO_TUNER_MAPPING")):
        raise OptionError(
            f"kinds 'peft:<method>' need a newer peft than {peft.__version__} (its methods are not registered in "
            "peft.mapping); 0.15 and later are"
        )
    tuners = mapping.PEFT_TYPE_TO_TUNER_MAPPING
    return {
        str(kind.value).lower(): config
        for kind, config in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if isinstance(tuners.get(kind), type) and issubclass(tuners[kind], BaseTuner)
    }


def peft_config(method: str, settings: dict[str, Any]) -> Any:
    """Return peft's configuration of a method, with the submodule ``layer`` as its target.

    Raises:
        ValueError, TypeError, ImportError: whatever peft raises for these settings.
    """
    config = peft_types()[method]
    targets: dict[str, Any] = {"target_modules": ["layer"], "feedforward_modules": []}
    fixed = {name: value for name, value in targets.items() if name in config.__dataclass_fields__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(**fixed, **settings)


def build_layer(method: str, settings: dict[str, Any], geometry: ConvGeometry) -> nn.Module:
    """Return peft's layer for a host of this shape, without the host's weight and bias.

    It is built on the default device; if that is meta and the method fails there, on the CPU, and then moved to meta.

    Raises:
        Exception: whatever peft raises for a layer it does not support.
    """
    device = torch.get_default_device() if hasattr(torch, "get_default_device") else torch.empty(0).device
    try:
        return without_host(wrap(method, settings, stand_in(geometry)))
    except (RuntimeError, NotImplementedError):
        if device.type != "meta":
            raise
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return without_host(wrap(method, settings, stand_in(geometry))).to("meta")


def stand_in(geometry: ConvGeometry) -> nn.Module:
    """Return a plain layer with a geometry's channels, kernel and groups and a bias, for peft to wrap."""
    if geometry.linear:
        return nn.Linear(geometry.in_channels, geometry.out_channels)
    return nn.Conv2d(geometry.in_channels, geometry.out_channels, geometry.kernel_size, groups=geometry.groups)


def wrap(method: str, settings: dict[str, Any], layer: nn.Module) -> nn.Module:
    """Return peft's layer around ``layer``, in eval mode.

    Raises:
        Exception: whatever peft raises for a layer it does not support.
    """
    from peft import mapping

    config = peft_config(method, settings)
    holder = nn.Module()
    holder.layer = layer
    with without_compiling():
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](holder, config, ADAPTER)
    wrapped: Any = holder.layer
    if not hasattr(wrapped, "base_layer"):
        raise NotImplementedError(f"peft's {method} leaves a {type(layer).__name__} as it is")
    return wrapped.eval()


@contextmanager
def without_compiling() -> Iterator[None]:
    """Keep BOFT from compiling its CUDA extension in this context; with one butterfly factor it needs none."""
    module: Any = sys.modules.get("peft.tuners.boft.layer")
    if not hasattr(module, "_FBD_CUDA"):
        yield
        return
    before, module._FBD_CUDA = module._FBD_CUDA, False
    try:
        yield
    finally:
        module._FBD_CUDA = before


def without_host(wrapped: nn.Module) -> nn.Module:
    """Remove the host's parameters from a wrapped layer, in place, and return the layer with the method's own left.

    ``base_layer`` stays as an attribute that peft's methods can read, but no longer as a submodule, and its weight and
    bias are meta tensors. The method's own layers get the classes of ``adapters.layers``, which nobody else looks for.
    """
    base: Any = wrapped._modules.pop("base_layer")
    for name in ("weight", "bias"):
        tensor = base._parameters.pop(name)
        base.__dict__[name] = torch.empty_like(tensor.detach(), device="meta")
    wrapped.__dict__["base_layer"] = base
    for part in wrapped.modules():
        part.__class__ = _OWN_CLASSES.get(type(part), type(part))
    return wrapped


@contextmanager
def _host_tensors(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Give a layer's ``base_layer`` this weight and bias inside the context."""
    base = wrapped.base_layer.__dict__
    before = base["weight"], base["bias"]
    base["weight"], base["bias"] = weight, bias
    try:
        yield
    finally:
        base["weight"], base["bias"] = before


class _Call(nn.Module):
    """A module whose forward computes a wrapped layer's change; ``functional_call`` can replace its parameters."""

    def __init__(self, method: str, layer: nn.Module) -> None:
        super().__init__()
        self.method, self.layer = method, layer

    def forward(self, weight: Tensor, bias: Tensor | None) -> Change:
        return _CHANGES.get(self.method, _delta_weight)(self.layer, weight, bias)


def change_of(method: str, wrapped: nn.Module, weight: Tensor, bias: Tensor | None) -> Change:
    """Return what the method adds to a weight and bias; for half precision computed in float32 and rounded once.

    Args:
        method: name of the peft method.
        wrapped: the method's layer, as ``build_layer`` returns it.
        weight: ``(out, in)``, or ``(out, in_per_group, kh, kw)``.
        bias: ``(out,)`` or None.
    """
    call = _Call(method, wrapped)
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return call(weight, bias)
    tensors = [*call.named_parameters(), *call.named_buffers()]
    in_float32 = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors}
    change = torch.func.functional_call(call, in_float32, (weight.float(), None if bias is None else bias.float()))
    return Change(change.weight.to(weight.dtype), None if change.bias is None else change.bias.to(weight.dtype))


def _delta_weight(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """Return peft's delta weight as the change: true for every method that is not in ``_CHANGES``."""
    if not hasattr(wrapped, "get_delta_weight"):
        raise NotImplementedError("its layer works on activations and offers no delta weight")
    with _host_tensors(wrapped, weight, bias):
        delta = wrapped.get_delta_weight(ADAPTER)
    if isinstance(delta, Tensor) and delta.is_sparse:
        delta = delta.to_dense()
    if not isinstance(delta, Tensor) or delta.numel() != weight.numel():
        shape = tuple(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
        raise NotImplementedError(f"its delta weight is {shape}, the layer's weight {tuple(weight.shape)}")
    return Change(delta.reshape(weight.shape), None)


def _rotated(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """Return OFT's change: ``W' = W R^T`` on each output channel's flattened kernel; fresh, ``R - I`` is exactly 0."""
    with _host_tensors(wrapped, weight, bias):
        rotation = wrapped.get_delta_weight(ADAPTER)
    return Change((weight.flatten(1) @ _minus_identity(rotation).T).reshape(weight.shape), None)


def _rotated_and_scaled(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """Return BOFT's change: ``W' = s (W R^T)``, with a scale s for each output channel."""
    with _host_tensors(wrapped, weight, bias):
        rotation, scale = wrapped.get_delta_weight(ADAPTER)
    flat, scale = weight.flatten(1), scale.reshape(-1, 1)
    change = (flat @ _minus_identity(rotation).T) * scale + flat * (scale - 1)
    return Change(change.reshape(weight.shape), None)


def _minus_identity(matrix: Tensor) -> Tensor:
    return matrix - torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def _reflected(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """Return HRA's change: ``W' = W H_1 H_2 ... H_r`` with reflections ``H = I - 2 u u^T``, applied in pairs.

    In a fresh adapter the two vectors of each pair are equal, and their reflections, multiplied, cancel only up to
    rounding. The form ``H_u H_v = I - 2 (u u^T - v v^T) H_v`` with ``u u^T - v v^T = (d s^T + s d^T) / 2``,
    ``d = u - v``, ``s = u + v`` cancels exactly.
    """
    flat = weight.flatten(1)
    if wrapped.hra_apply_GS[ADAPTER] or wrapped.hra_r[ADAPTER] % 2:
        return Change((flat @ _minus_identity(wrapped.get_delta_weight(ADAPTER))).reshape(weight.shape), None)
    vectors = wrapped.hra_u[ADAPTER].T.contiguous()
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    change = torch.zeros_like(flat)
    for u, v in zip(vectors[::2], vectors[1::2], strict=True):
        current, d, s = flat + change, u - v, u + v
        step = -(torch.outer(current @ d, s) + torch.outer(current @ s, d))
        change = change + step - 2 * torch.outer(step @ v, v)
    return Change(change.reshape(weight.shape), None)


def _scaled(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """Return IA3's change: the output is scaled by a learnt vector, so weight and bias both change."""
    factor = wrapped.ia3_l[ADAPTER].flatten() - 1
    per_channel = factor.view(-1, *[1] * (weight.ndim - 1))
    return Change(weight * per_channel, None if bias is None else bias * factor)


def _hadamard(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """Return HiRA's change: ``W' = W * (1 + B A)``, elementwise."""
    return Change(weight * _delta_weight(wrapped, weight, bias).weight, None)


_CHANGES = {"oft": _rotated, "boft": _rotated_and_scaled, "hra": _reflected, "ia3": _scaled, "hira": _hadamard}
