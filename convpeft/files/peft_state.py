"""The tensors of a peft folder and those of convpeft's adapters: how one is made from the other."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Site
from ..adapters.options import read_options
from ..adapters.registry import adapter_class, file_refusal, make_adapter
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry
from ..convolution.kernels import embed_on_grid
from ..errors import ConvPeftError, brief
from ..hosts.modules import is_within
from ..hosts.slots import BASE
from ..hosts.unfrozen import tensors_of
from ..injection.values import Given
from .peft_config import PeftConfig

_LORA = {"lora_A.weight": "down", "lora_B.weight": "up"}
_BIAS = "lora_B.bias"
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


def arithmetic_refusal(geometry: ConvGeometry, method: str) -> str | None:
    """Return why peft computes something else on a layer than the convolution with a changed weight, or None.

    These are known for peft 0.21. What else there is shows when peft's own layer is run, see ``peft_check``.
    """
    if geometry.transposed:
        return "peft has no adapters for transposed convolutions"
    if geometry.padding_mode != "zeros" and any(geometry.padding):
        mode = geometry.padding_mode
        return f"peft's adapter pads with zeros where the layer pads by {mode!r}, so that its merge changes the output"
    if method == "lora" and geometry.dilation != (1, 1) and geometry.kernel_size != (1, 1):
        return f"peft's LoRA leaves out the layer's dilation {geometry.dilation}"
    if method == "lora" and geometry.groups > 1:
        return f"peft's LoRA reads across the layer's {geometry.groups} groups, and peft refuses to merge it"
    return None


def weight_norms(module: nn.Module) -> Tensor:
    """Return the norm of each output channel's weight, ``(out,)`` in float64, of the base's own weight."""
    weight = tensors_of(module, BASE)["weight"].detach().to("cpu", torch.float64)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


@dataclasses.dataclass
class Sorted:
    """The tensors of a peft folder by what they belong to.

    Attributes:
        adapters: by layer and by peft's name within it.
        owned: values of modules that train along, by module and tensor.
        problems: what belongs to nothing of this model.
    """

    adapters: dict[str, dict[str, Tensor]]
    owned: dict[str, dict[str, Tensor]]
    problems: list[str]


def sort_tensors(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], prefix: str) -> Sorted:
    """Return the tensors of a peft folder sorted by the modules of a model.

    Args:
        tensors: by their keys in the file.
        modules: the user's, by name.
        prefix: of every key.
    """
    found = Sorted({}, {}, [])
    own = {name: set(tensors_of(module, BASE)) for name, module in modules.items()}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            found.problems.append(f"{brief(key)} does not begin with {prefix!r}, as peft's keys for one model do")
            continue
        parts = key.removeprefix(prefix).split(".")
        depth = next((n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules), 0)
        layer, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
        if rest.removeprefix("base_layer.") in own[layer]:
            found.owned.setdefault(layer, {})[rest.removeprefix("base_layer.")] = tensor
        elif isinstance(modules[layer], PLAIN_HOSTS):
            found.adapters.setdefault(layer, {})[rest] = tensor
        else:
            found.problems.append(f"{brief(key)}: no layer of this model has a name that it begins with")
    return found


def given_lora(config: PeftConfig, name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Given:
    """Return the adapter of kind ``lora`` that peft's LoRA on a layer is.

    Raises:
        ConvPeftError: if its tensors are not those of a LoRA, or of another rank than the configuration says.
    """
    values = {ours: tensors[theirs] for theirs, ours in _LORA.items() if theirs in tensors}
    known = {*_LORA, *_MAGNITUDES, *([_BIAS] if config.values.get("lora_bias") else [])}
    strange = [key for key in tensors if key not in known]
    missing = len(values) < 2 or (config.values.get("lora_bias") and _BIAS not in tensors)
    if missing or strange:
        what = (
            f"{brief(strange[0])} has no counterpart here" if strange else "lora_A or lora_B, or its bias, is missing"
        )
        raise ConvPeftError(f"{name}: {what}")
    geometry = ConvGeometry.of(module)
    values = {key: value if value.ndim == 4 else value[..., None, None] for key, value in values.items()}
    rank = int(values["down"].shape[0]) if values["down"].ndim == 4 else 0
    said = config.of_layer("r", "rank_pattern", name)
    if said is not None and said != rank:
        raise ConvPeftError(f"{name}: its rank is {rank}, and the configuration says {said}")
    options: dict[str, Any] = {"rank": rank, "alpha": float(config.of_layer("lora_alpha", "alpha_pattern", name) or 8)}
    if config.values.get("use_rslora"):
        options["rslora"] = True
    if _BIAS in tensors:
        options["bias"] = True
        values["bias"] = (tensors[_BIAS].double() * _scale(options)).to(_wide(tensors[_BIAS]))
    if config.values.get("lora_dropout"):
        options["dropout"] = config.values["lora_dropout"]
    magnitude = next((tensors[key] for key in _MAGNITUDES if key in tensors), None)
    if bool(config.values.get("use_dora")) != (magnitude is not None):
        raise ConvPeftError(f"{name}: use_dora is {config.values.get('use_dora')}, and its magnitudes say otherwise")
    if magnitude is not None:
        norms = weight_norms(module)
        if magnitude.numel() != geometry.out_channels:
            raise ConvPeftError(f"{name}: {magnitude.numel()} magnitudes for {geometry.out_channels} output channels")
        options["dora"] = True
        values["magnitude"] = (magnitude.flatten().double() - norms).to(_wide(magnitude))
    return Given("lora", options, values)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return a dtype for what is computed from a tensor: its own, and float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _scale(options: Mapping[str, Any]) -> float:
    return options["alpha"] / (math.sqrt(options["rank"]) if options.get("rslora") else options["rank"])


def given_method(config: PeftConfig, name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Given:
    """Return the adapter of a kind ``peft:<method>`` that peft's own on a layer is.

    Raises:
        ConvPeftError: if a file may not ask for it, or its tensors are not those that the configuration asks for.
    """
    kind = f"peft:{config.method}"
    options_class = adapter_class(kind).Options
    fields = {field.name: field.default for field in dataclasses.fields(options_class)}
    options: dict[str, Any] = {}
    for key, default in fields.items():
        if key in config.values and not key.startswith("init") and "dropout" not in key:
            value = config.values[key]
            for field, pattern in (("r", "rank_pattern"), (config.alpha_field, "alpha_pattern")):
                value = config.of_layer(field, pattern, name) if key == field else value
            if value != default:
                options[key] = value
    size = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=1)
    refusal = file_refusal(kind, options, size)
    if refusal:
        raise ConvPeftError(f"{name}: {refusal}")
    read, problems = read_options(kind, options_class, options)
    if read is None:
        raise ConvPeftError(f"{name}: {problems[0]}")
    draft = _draft(kind, Site("parallel", ConvGeometry.of(module)), read)
    if draft is None:  # the plan will say why
        return Given(kind, options, tensors)
    theirs = {peft_key(key): (key, tensor) for key, tensor in draft.state_dict().items()}
    for key, (_, tensor) in theirs.items():
        if key not in tensors or tensors[key].shape != tensor.shape:
            there = tuple(tensors[key].shape) if key in tensors else "missing"
            raise ConvPeftError(f"{name}: {key} is {there}; peft's {config.method} makes {tuple(tensor.shape)} here")
    return Given(kind, options, {theirs[key][0] if key in theirs else key: value for key, value in tensors.items()})


def _draft(kind: str, site: Site, options: Any) -> Adapter | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make_adapter(kind, site, options, "meta")
    except Exception:  # whatever peft raises for a layer that it does not serve
        return None


def peft_key(key: str) -> str:
    """Return the name that a tensor of a ``peft:`` kind has in peft's own files, within its layer.

    Example:
        >>> peft_key("layer.oft_R.default.weight"), peft_key("layer.hada_w1_a.default")
        ('oft_R.weight', 'hada_w1_a')
    """
    return ".".join(part for part in key.removeprefix("layer.").split(".") if part != "default")


def peft_tensors(adapter: Adapter, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an adapter under peft's names within its layer, as peft shapes them.

    Args:
        adapter: of kind ``lora`` or ``peft:<method>``.
        module: its layer; DoRA's magnitude is that of its weight and the adapter's difference.
    """
    if adapter.kind != "lora":
        yield from ((peft_key(key), tensor) for key, tensor in adapter.state_dict().items())
        return
    geometry = adapter.site.geometry
    down, up = adapter.state_dict()["down"], adapter.state_dict()["up"]
    if down.shape[2:] != geometry.kernel_size:  # pointwise
        down = embed_on_grid(down, geometry.kernel_size, geometry.kernel_size)
    yield "lora_A.weight", down.flatten(1) if geometry.linear else down
    yield "lora_B.weight", up.flatten(1) if geometry.linear else up
    if adapter.options.bias:
        bias = adapter.state_dict()["bias"]
        yield _BIAS, (bias.double() / adapter.scale).to(_wide(bias))  # type: ignore[operator]  # peft scales it
    if adapter.options.dora:
        difference = adapter.state_dict()["magnitude"]
        magnitude = (weight_norms(module) + difference.double().cpu()).to(_wide(difference))
        yield "lora_magnitude_vector", magnitude if geometry.linear else magnitude.view(1, -1, 1, 1)


def tops(names: Mapping[str, Any]) -> list[str]:
    """Return the names that are within no other one."""
    return [name for name in names if not any(other != name and is_within(name, other) for other in names)]
