"""peft's own layers, borrowed: how one is built without a model, and what it makes of a weight that is lent to it."""

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

ADAPTER = "default"  # peft's name of the one adapter in each layer

_NEEDED = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING")


class Change(NamedTuple):
    """What a method adds to a layer: ``W' - W``, and ``b' - b`` (None when the bias is left alone)."""

    weight: Tensor
    bias: Tensor | None


@cache
def peft_types() -> dict[str, Any]:
    """Return the configuration classes of all methods of the installed peft that put layers around layers, by name.

    Raises:
        OptionError: if peft is missing, or too old to be asked.
    """
    try:
        import peft
        from peft import mapping
        from peft.tuners.tuners_utils import BaseTuner
    except ImportError as error:
        raise OptionError(f"kinds 'peft:<method>' need the package peft, which cannot be imported: {error}") from error
    if not all(hasattr(mapping, name) for name in _NEEDED):
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
    """Return peft's configuration of a method for the one layer of a holder.

    Raises:
        ValueError, TypeError, ImportError: as peft does.
    """
    config = peft_types()[method]
    fields = config.__dataclass_fields__
    fixed: dict[str, Any] = {"target_modules": ["layer"]} if "target_modules" in fields else {}
    if "feedforward_modules" in fields:
        fixed["feedforward_modules"] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config(**fixed, **settings)


def build_layer(method: str, settings: dict[str, Any], geometry: ConvGeometry) -> nn.Module:
    """Return peft's layer for a host of this shape, the host's weight and bias taken out of it.

    It is built on the default device. What cannot be built on the meta device is built on the CPU and moved.

    Raises:
        Exception: whatever peft raises for a layer it does not serve.
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
    """Return a plain layer of a geometry's channels, kernel and groups, with a bias, for peft to wrap."""
    if geometry.linear:
        return nn.Linear(geometry.in_channels, geometry.out_channels)
    return nn.Conv2d(geometry.in_channels, geometry.out_channels, geometry.kernel_size, groups=geometry.groups)


def wrap(method: str, settings: dict[str, Any], layer: nn.Module) -> nn.Module:
    """Return the layer as peft wraps it, in eval mode.

    Raises:
        Exception: whatever peft raises for a layer it does not serve.
    """
    from peft import mapping

    config = peft_config(method, settings)
    holder = nn.Module()
    holder.layer = layer
    with _without_compiling():
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](holder, config, ADAPTER)
    wrapped: Any = holder.layer
    if not hasattr(wrapped, "base_layer"):
        raise NotImplementedError(f"peft's {method} leaves a {type(layer).__name__} as it is")
    return wrapped.eval()


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Keep BOFT from compiling its CUDA extension inside the context: with one butterfly factor none is needed."""
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
    """Take the host out of a wrapped layer, in place, and return it: what is left is the method's own.

    peft's methods still find ``base_layer``, an empty one: outside the module tree, without parameters.
    """
    base: Any = wrapped._modules.pop("base_layer")
    for name in ("weight", "bias"):
        tensor = base._parameters.pop(name)
        base.__dict__[name] = torch.empty_like(tensor.detach(), device="meta")
    wrapped.__dict__["base_layer"] = base
    return wrapped


@contextmanager
def lent(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Let a layer's ``base_layer`` show this weight and bias inside the context."""
    base = wrapped.base_layer.__dict__
    before = base["weight"], base["bias"]
    base["weight"], base["bias"] = weight, bias
    try:
        yield
    finally:
        base["weight"], base["bias"] = before


class _Call(nn.Module):
    """A wrapped layer's change as a forward, so that ``functional_call`` can lend it wider parameters."""

    def __init__(self, method: str, layer: nn.Module) -> None:
        super().__init__()
        self.method, self.layer = method, layer

    def forward(self, weight: Tensor, bias: Tensor | None) -> Change:
        return _CHANGES.get(self.method, _added)(self.layer, weight, bias)


def change_of(method: str, wrapped: nn.Module, weight: Tensor, bias: Tensor | None) -> Change:
    """Return what the method adds to a weight and bias; in half precision worked out in float32, and rounded once.

    Args:
        method: of peft.
        wrapped: its layer, as ``build_layer`` returns it.
        weight: ``(out, in)``, or ``(out, in_per_group, kh, kw)``.
        bias: ``(out,)`` or None.
    """
    call = _Call(method, wrapped)
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return call(weight, bias)
    wide = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in [*call.named_parameters(), *call.named_buffers()]
    }
    change = torch.func.functional_call(call, wide, (weight.float(), None if bias is None else bias.float()))
    return Change(change.weight.to(weight.dtype), None if change.bias is None else change.bias.to(weight.dtype))


def _added(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """For the methods whose delta weight is what is added."""
    if not hasattr(wrapped, "get_delta_weight"):
        raise NotImplementedError("its layer works on activations and offers no delta weight")
    with lent(wrapped, weight, bias):
        delta = wrapped.get_delta_weight(ADAPTER)
    if isinstance(delta, Tensor) and delta.is_sparse:
        delta = delta.to_dense()
    if not isinstance(delta, Tensor) or delta.numel() != weight.numel():
        shape = tuple(delta.shape) if isinstance(delta, Tensor) else type(delta).__name__
        raise NotImplementedError(f"its delta weight is {shape}, the layer's weight {tuple(weight.shape)}")
    return Change(delta.reshape(weight.shape), None)


def _rotated_inputs(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """OFT: ``W' = W R^T`` over the flattened taps of each output channel; ``R - I`` is exactly 0 when fresh."""
    with lent(wrapped, weight, bias):
        rotation = wrapped.get_delta_weight(ADAPTER)
    return Change((weight.flatten(1) @ _beyond_identity(rotation).T).reshape(weight.shape), None)


def _rotated_and_scaled(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """BOFT: ``W' = s (W R^T)``, with a scale s for each output channel."""
    with lent(wrapped, weight, bias):
        rotation, scale = wrapped.get_delta_weight(ADAPTER)
    flat, scale = weight.flatten(1), scale.reshape(-1, 1)
    change = (flat @ _beyond_identity(rotation).T) * scale + flat * (scale - 1)
    return Change(change.reshape(weight.shape), None)


def _beyond_identity(matrix: Tensor) -> Tensor:
    return matrix - torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def _reflected(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """HRA: ``W' = W H_1 H_2 ... H_r`` with ``H = I - 2 u u^T``, two at a time.

    A fresh adapter has equal vectors in each pair, whose reflections cancel up to rounding when multiplied out. Written
    as ``H_u H_v = I - 2 (u u^T - v v^T) H_v`` with ``u u^T - v v^T = (d s^T + s d^T) / 2``, ``d = u - v``, ``s = u + v``,
    a pair of equal vectors changes nothing, exactly.
    """
    if wrapped.hra_apply_GS[ADAPTER] or wrapped.hra_r[ADAPTER] % 2:
        return Change(
            (weight.flatten(1) @ _beyond_identity(wrapped.get_delta_weight(ADAPTER))).reshape(weight.shape), None
        )
    vectors = wrapped.hra_u[ADAPTER].T.contiguous()
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    flat = weight.flatten(1)
    change = torch.zeros_like(flat)
    for u, v in zip(vectors[::2], vectors[1::2], strict=True):
        now, d, s = flat + change, u - v, u + v
        turned = -(torch.outer(now @ d, s) + torch.outer(now @ s, d))
        change = change + turned - 2 * torch.outer(turned @ v, v)
    return Change(change.reshape(weight.shape), None)


def _scaled_outputs(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """IA3: the output times a learnt vector, so weight and bias both."""
    beyond = wrapped.ia3_l[ADAPTER].flatten() - 1
    per_channel = beyond.view(-1, *[1] * (weight.ndim - 1))
    return Change(weight * per_channel, None if bias is None else bias * beyond)


def _hadamard(wrapped: Any, weight: Tensor, bias: Tensor | None) -> Change:
    """HiRA: ``W' = W * (1 + B A)``, element by element."""
    return Change(weight * _added(wrapped, weight, bias).weight, None)


_CHANGES = {
    "oft": _rotated_inputs,
    "boft": _rotated_and_scaled,
    "hra": _reflected,
    "ia3": _scaled_outputs,
    "hira": _hadamard,
}
