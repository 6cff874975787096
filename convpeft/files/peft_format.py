"""Adapters in the format of the package peft, both ways: a folder with a configuration and a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry
from ..convolution.precision import floating_dtype
from ..errors import AdapterFileError, ConvPeftError, HostError, brief, shortened
from ..hosts.buffers import own_buffers
from ..hosts.model import AdaptedModel, whole
from ..hosts.modules import base_modules, is_within, unique_modules
from ..hosts.slots import BASE
from ..hosts.trainers import guard_trainers
from ..hosts.transaction import with_normal_tensors
from ..hosts.unfrozen import check_tensors_present, tensors_of
from ..hosts.wrappers import refuse_parallel
from ..injection.install import check_name, install
from ..injection.switching import note_training
from ..injection.values import Prepared, prepare
from ..planning.plan import Plan
from .fingerprints import plain
from .peft_check import disagreements
from .peft_config import CONFIG, PREFIX, TENSORS, PeftConfig, any_of, config_text, exactly, read_config
from .peft_state import Sorted, arithmetic_refusal, given_lora, given_method, peft_tensors, sort_tensors, tops
from .reading import opened
from .saving import chosen
from .writing import write

_MOST_NAMED = 12  # problems in one error


@with_normal_tensors
def from_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    lean: bool = True,
    dtype: torch.dtype | str | None = None,
) -> Plan:
    """Put the adapter of a peft folder into the model in place, make it the active one, and return what it adapts.

    Plain LoRA, rsLoRA and DoRA become the kind ``lora``, other methods ``peft:<method>``; what ``modules_to_save`` and
    ``bias`` saved becomes unfrozen modules. All or nothing: before the first change peft's own layers run beside
    convpeft's on random inputs, and whatever they compute otherwise is refused. A peft folder says nothing of its base:
    load the base's weights first.

    Args:
        model: the base the adapter was trained on; peft's names are those of its modules.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; a ``.bin`` file is not read.
        name: to give it here.
        lean: see ``inject``.
        dtype: of the adapters' parameters; unset, that of their layers, and float32 beside half precision unless the file
            is in that very precision.

    Raises:
        AdapterFileError: if the folder is damaged, does not fit, or says something that has no counterpart here.
        StateError: if the name is taken.
    """
    folder, root, wanted = Path(folder), whole(model), floating_dtype(dtype)
    check_name(root, name)
    refuse_parallel(root)
    guard_trainers(map(type, root.modules()))
    config = read_config(folder)
    try:
        with opened(folder / TENSORS) as source:
            tensors = source.read()
    except AdapterFileError as error:
        hint = f" A peft folder has {CONFIG} and {TENSORS}; .bin files are pickles, save them again with peft."
        raise AdapterFileError(f"{error}.{hint if not (folder / TENSORS).exists() else ''}") from error
    modules = dict(base_modules(root))
    found = sort_tensors(tensors, modules, PREFIX)
    given = {}
    problems = [*found.problems, *_untargeted(config, dict(unique_modules(root)), found)]
    for layer, own in found.adapters.items():
        module = modules[layer]
        refusal = arithmetic_refusal(ConvGeometry.of(module), config.method)
        try:
            if refusal:
                raise ConvPeftError(f"{layer}: {refusal}")
            make = given_lora if config.method == "lora" else given_method
            given[layer] = make(config, layer, module, own)
        except ConvPeftError as error:
            problems.append(str(error))
    if not (given or found.owned or problems):
        problems.append("it has no tensors")
    _raise(folder, problems)
    prepared = prepare(root, given, found.owned, heading=str(folder), error=AdapterFileError, dtype=wanted)
    _raise(folder, _check_beside_peft(modules, prepared, config.method, found))
    install(root, name, prepared.record, prepared.built, lean=lean)
    return prepared.plan


def _untargeted(config: PeftConfig, modules: Mapping[str, nn.Module], found: Sorted) -> Iterator[str]:
    """Yield layers that a configuration names and the file has nothing for, and the other way round."""
    for name, module in modules.items():
        kept = any(is_within(name, each) for each in found.owned)
        wanted = config.targets(name) if isinstance(module, PLAIN_HOSTS) else None
        if wanted and name not in found.adapters and not kept:
            yield f"{name}: its target_modules name it, and the file has no tensors for it"
        elif wanted is False and name in found.adapters:
            yield f"{name}: the file has tensors for it, and its target_modules do not name it"


def _check_beside_peft(modules: Mapping[str, nn.Module], prepared: Prepared, method: str, found: Sorted) -> list[str]:
    """Return where peft's own layers compute something else than what was prepared.

    They get the file's own tensors; where these were rounded to another dtype, the rounded ones.
    """
    adapters = prepared.built.adapters
    state: dict[str, Tensor] = {}
    for layer, adapter in adapters.items():
        own = found.adapters[layer]
        tensors = dict(peft_tensors(adapter, modules[layer])) if _is_rounded(adapter, own) else own
        state.update({f"{PREFIX}{layer}.{key}": each for key, each in tensors.items()})
    config = {**_settings(method, adapters), "target_modules": any_of(adapters)}
    return disagreements(modules, adapters, {}, config, state) if adapters else []


def _is_rounded(adapter: Adapter, own: Mapping[str, Tensor]) -> bool:
    """Return whether an adapter was rounded when it got the dtype of its layer: it is then another one by as much."""
    (here,) = {each.dtype for each in adapter.state_dict().values() if each.is_floating_point()} or {torch.float64}
    return any(each.is_floating_point() and torch.promote_types(each.dtype, here) != here for each in own.values())


def to_peft(model: nn.Module, folder: str | Path, *, name: str | None = None) -> Path:
    """Write one adapter as a folder that peft loads, and return the path of the folder.

    The adapter may consist of ``lora`` beside layers (rsLoRA and DoRA included), or of one kind ``peft:<method>``;
    unfrozen modules become ``modules_to_save``. Before anything is written, peft's own code loads the adapter into
    copies of its layers and runs them, merged as well: what it computes otherwise is refused. That BatchNorm layers are
    held in eval mode is nothing that peft can say: keep the model in eval mode there.

    Args:
        model: an injected model.
        folder: made if need be; ``adapter_config.json`` and ``adapter_model.safetensors`` in it are replaced.
        name: of the adapter; unset, the only one, or the only active one.

    Raises:
        HostError: if peft cannot express the adapter, or would compute something else; the text says which layers.
        StateError: if nothing is injected, it is not clear which adapter is meant, or a tensor of it is gone.
        AdapterFileError: if the files cannot be written.
    """
    adapted = AdaptedModel.of(model)
    name = chosen(adapted, name)
    record = adapted.record(name)
    note_training(adapted)
    check_tensors_present({key: (adapted.module(key), None) for key in record.owned})
    modules, adapters = dict(base_modules(adapted.root)), dict(adapted.adapters(name))
    problems = list(_inexpressible(adapted, adapters, name))
    _refuse(name, problems)
    method = next(iter(adapters.values())).kind.removeprefix("peft:")
    _refuse(name, list(_layers_refused(adapters, method)))
    values, owners = _saved(adapted, name, modules)
    state = {
        f"{PREFIX}{layer}.{key}": tensor
        for layer, adapter in adapters.items()
        for key, tensor in peft_tensors(adapter, adapted.module(layer))
    }
    state |= {f"{PREFIX}{module}.{key}": tensor for module, own in values.items() for key, tensor in own.items()}
    targets = {"target_modules": any_of(adapters), "modules_to_save": owners or None}
    config = {**_settings(method, adapters), **targets}
    state = {key: plain(tensor).clone() for key, tensor in state.items()}
    _refuse(name, disagreements(modules, adapters, values, config, state))
    folder = Path(folder)
    write(folder / TENSORS, safetensors_bytes(state, {"format": "pt"}))
    write(folder / CONFIG, config_text(config))
    return folder


def _inexpressible(adapted: AdaptedModel, adapters: Mapping[str, Adapter], name: str) -> Iterator[str]:
    """Yield what of an adapter peft has no words for."""
    record = adapted.record(name)
    kinds = sorted({adapter.kind for adapter in adapters.values()})
    strange = [kind for kind in kinds if kind != "lora" and not kind.startswith("peft:")]
    if not adapters:
        yield "it only unfreezes modules, and peft loads no folder without adapters"
    if strange:
        layers = [layer for layer, adapter in adapters.items() if adapter.kind in strange]
        yield f"peft has no {', '.join(strange)} ({shortened(layers)}); save_adapter writes every kind"
    elif len(kinds) > 1:
        yield f"it has adapters of kinds {', '.join(kinds)}, and a peft folder has one method"
    outputs = [layer for layer, adapter in adapters.items() if adapter.site.place == "output"]
    if outputs:
        yield f"peft has no adapters on a module's output ({shortened(outputs)})"
    both = [layer for layer in adapters if any(is_within(layer, owned) for owned in record.owned)]
    if both:
        yield f"{shortened(both)}: adapted and unfrozen, and peft has one or the other"
    for field in ("dropout", "rslora", "dora", "bias") if kinds == ["lora"] else ("dropout",):
        told = {getattr(adapter.options, field) for adapter in adapters.values()}
        if len(told) > 1:
            yield f"its layers have {field} {', '.join(map(str, sorted(told)))}, and a peft folder has one for all"
    if kinds and kinds[0].startswith("peft:") and any(adapter.options.dropout for adapter in adapters.values()):
        yield "the option dropout of its kind is convpeft's own; set it to 0"
    varying = {"r", "alpha", "lora_alpha"} & _patterned(kinds)
    if len(kinds) == 1 and kinds[0].startswith("peft:"):
        settings = [adapter.options.settings() for adapter in adapters.values()]
        differ = [key for key in settings[0] if key not in varying and len({repr(each[key]) for each in settings}) > 1]
        if differ:
            yield f"its layers differ in {', '.join(differ)}, and a peft folder has one for all"


def _patterned(kinds: list[str]) -> set[str]:
    """Return the options of a kind that peft can set by layer."""
    if not kinds or not kinds[0].startswith("peft:"):
        return {"r", "lora_alpha"}
    from ..adapters.peft_kinds.layers import peft_types

    fields = peft_types()[kinds[0].removeprefix("peft:")].__dataclass_fields__
    return ({"r"} if "rank_pattern" in fields else set()) | (
        {"alpha", "lora_alpha"} if "alpha_pattern" in fields else set()
    )


def _layers_refused(adapters: Mapping[str, Adapter], method: str) -> Iterator[str]:
    for layer, adapter in adapters.items():
        refusal = arithmetic_refusal(adapter.site.geometry, method)
        if refusal:
            yield f"{layer}: {refusal}"


def _settings(method: str, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return peft's configuration of a method, with the rank and alpha of each layer; without targets."""
    import peft

    config: dict[str, Any] = {
        "peft_type": method.upper(), "peft_version": peft.__version__, "task_type": None,
        "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    first = next(iter(adapters.values()))
    if first.kind == "lora":
        options = first.options
        config |= {"use_rslora": options.rslora, "use_dora": options.dora, "lora_dropout": options.dropout}
        config |= {"lora_bias": True} if options.bias else {}
        each = {layer: {"r": a.options.rank, "lora_alpha": _alpha(a)} for layer, a in adapters.items()}
    else:
        config |= first.options.settings()
        each = {layer: adapter.options.settings() for layer, adapter in adapters.items()}
    if method == "ia3":
        config["feedforward_modules"] = []  # peft asks for it beside target_modules
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"), ("alpha", "alpha_pattern")):
        values = {layer: settings[field] for layer, settings in each.items() if field in settings}
        if values:
            config[field] = next(iter(values.values()))
            differ = {exactly(layer): value for layer, value in values.items() if value != config[field]}
            if differ:
                config[pattern] = differ
    return config


def _alpha(adapter: Adapter) -> float | int:
    alpha = adapter.options.rank if adapter.options.alpha is None else adapter.options.alpha
    return int(alpha) if float(alpha).is_integer() else alpha


def _saved(
    adapted: AdaptedModel, name: str, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the values of all that peft saves beside the adapters, by module, and the ``modules_to_save`` that say so.

    peft takes every module whose name ends as one in the list does, with all below it. Those which are more than the
    adapter unfroze get the base's values.

    Raises:
        HostError: if an adapted layer is among them.
    """
    adapters = adapted.record(name).layers
    own = dict(adapted.unfrozen(name))
    names = {id(module): key for key, module in modules.items()}
    for module, buffers in own_buffers(adapted.root, name):
        key = names[id(module)]
        own[key] = {**tensors_of(module, BASE), **own.get(key, {}), **buffers}
    wanted: dict[str, Any] = dict.fromkeys(own)
    while True:
        heads = tops(wanted)
        ends = {key for key in modules if key and any(key.endswith(head) for head in heads)}
        more = [key for key in ends if not any(is_within(key, head) for head in heads)]
        if not more:
            break
        wanted.update(dict.fromkeys(more))
    taken = [layer for layer in adapters if any(is_within(layer, head) for head in heads)]
    if taken or "" in heads:
        raise HostError(
            f"adapter {name!r} cannot be written for peft: peft's modules_to_save would take {shortened(taken) or 'the root'} "
            "along, whose name begins or ends as that of an unfrozen module does"
        )
    below = {key: module for key, module in modules.items() if any(is_within(key, head) for head in heads)}
    return {key: {**tensors_of(module, BASE), **own.get(key, {})} for key, module in below.items()}, heads


def _raise(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "; ".join(map(brief, problems[:_MOST_NAMED]))
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise AdapterFileError(f"{folder} cannot be read as it was meant; the model is unchanged. {listed}{more}")


def _refuse(name: str, problems: list[str]) -> None:
    if problems:
        listed = "; ".join(map(brief, problems[:_MOST_NAMED]))
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise HostError(f"adapter {name!r} cannot be written for peft; nothing was written. {listed}{more}")
