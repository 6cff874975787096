"""Run peft's own code on an adapter's layers, beside convpeft's: what a folder says is what both compute, or is refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..adapters.peft_kinds.layers import without_compiling
from ..convolution.comparison import compare
from ..convolution.geometry import ConvGeometry, random_input
from ..convolution.kernels import ConvKernel, add_kernels, compose
from ..errors import ConvPeftError, brief
from ..hosts.slots import BASE
from ..hosts.swap import plain_copy
from ..hosts.unfrozen import tensors_of
from ..merging.forms import host_kernel
from .peft_config import PREFIX

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_NAME = "default"
_TOLERANCE = 1e-9  # relative, in float64: the rounding of one layer and of DoRA's magnitude, and no more
_STORED = 1e-6  # the same where a magnitude or a bias was computed, and then rounded to float32


def disagreements(
    modules: Mapping[str, nn.Module],
    adapters: Mapping[str, Adapter],
    saved: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> list[str]:
    """Return what peft does otherwise than convpeft with an adapter: a sentence for each layer; empty when nothing.

    peft puts the adapter into a stand-in for the model: all of its names, a float64 copy of each adapted layer, and
    nothing else. Each layer then runs on a random input, bare and merged.

    Args:
        modules: the user's, by name.
        adapters: by layer.
        saved: the tensors of modules that train along, by module.
        config: as ``adapter_config.json`` has it.
        state: as ``adapter_model.safetensors`` has it.
    """
    from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    model = _stand_in(modules, adapters, saved)
    hosts = {name: host_kernel(model.get_submodule(name)) for name in adapters}
    computed = [name for name, host in hosts.items() if host is None]
    if computed:
        return [f"{name}: its weight is computed (parametrised, weight-normed or pruned)" for name in computed]
    values = {key: value for key, value in config.items() if key not in ("peft_type", "peft_version")}
    plain = {key.removeprefix(PREFIX): value.detach().cpu() for key, value in state.items()}
    try:
        with warnings.catch_warnings(), without_compiling():
            warnings.simplefilter("ignore")
            kind = next(k for k in PEFT_TYPE_TO_CONFIG_MAPPING if str(k.value) == config["peft_type"])
            model = inject_adapter_in_model(PEFT_TYPE_TO_CONFIG_MAPPING[kind](**values), model, _NAME).double().eval()
            own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            differ = sorted(own ^ set(plain))
            if differ:
                return [
                    f"peft's tensors for it are others: {differ[0]} is {'missing' if differ[0] in own else 'strange'}"
                ]
            set_peft_model_state_dict(model, plain)
    except Exception as error:  # whatever peft raises for an adapter that it does not serve
        return [f"peft does not load it: {type(error).__name__}: {brief(' '.join(str(error).split()))}"]
    found = [
        _difference(name, model.get_submodule(name), host, adapters[name])
        for name, host in hosts.items()
        if host is not None
    ]
    return [problem for problem in found if problem is not None]


def _stand_in(
    modules: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], saved: Mapping[str, Mapping[str, Tensor]]
) -> nn.Module:
    """Return a model with all the names of another one, and the adapted layers and the tensors that are saved in it."""
    model = nn.Module()
    for name, module in modules.items():
        if not name:
            continue
        parent, _, last = name.rpartition(".")
        container = next((each for each in _CONTAINERS if type(module) is each), nn.Module)
        stand_in = _bare(module) if name in adapters else container()
        for key, tensor in saved.get(name, {}).items() if name not in adapters else ():
            if isinstance(tensor, nn.Parameter):
                stand_in.register_parameter(key, nn.Parameter(tensor.detach().cpu().clone(), tensor.requires_grad))
            else:
                stand_in.register_buffer(key, tensor.detach().cpu().clone())
        model.get_submodule(parent).add_module(last, stand_in)
    return model


def _bare(layer: nn.Module) -> nn.Module:
    """Return a float64 copy of a layer with the base's own tensors, whatever it shows now."""
    copied = plain_copy(layer)
    for key, tensor in tensors_of(layer, BASE).items():
        (copied._parameters.get(key) if key in copied._parameters else copied._buffers[key]).data.copy_(tensor)  # type: ignore[union-attr]
    return copied


def _difference(name: str, layer: Any, host: ConvKernel, adapter: Adapter) -> str | None:
    """Return how peft's layer differs from the convolution with the kernel that convpeft merges, or None."""
    geometry = ConvGeometry.of(layer.base_layer)
    computed = adapter.kind == "lora" and (adapter.options.dora or adapter.options.bias)
    tolerance = _STORED if computed else _TOLERANCE
    x = random_input(geometry, 2 * max(geometry.kernel_size) + 3, torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            merged = add_kernels(host, [compose(adapter.chain(host if adapter.reads_host else None))])
            ours, theirs = merged(x), layer(x)
            apart = compare(ours, theirs, tolerance)
            if not apart.is_rounding:
                return (
                    f"{name}: peft's own layer computes something else than the layer with its changed weight: {apart}"
                )
            layer.merge()
            apart = compare(ours, layer(x), tolerance)
    except ConvPeftError as error:
        return f"{name}: {error}"
    except Exception as error:  # whatever peft's forward or merge raises
        return f"{name}: peft's own layer fails: {type(error).__name__}: {brief(' '.join(str(error).split()))}"
    return None if apart.is_rounding else f"{name}: what peft merges computes something else: {apart}"
