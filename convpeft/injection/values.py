"""Put adapters in whose values are known already: those of a foreign file, or of the difference to a fine-tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.options import read_options
from ..adapters.registry import adapter_class
from ..errors import ConvPeftError, SpecError, brief
from ..hosts.modules import base_modules, unique_modules
from ..hosts.records import AdapterRecord
from ..hosts.slots import BASE, base_class
from ..hosts.unfrozen import tensors_of
from ..planning.bypasses import bypassed
from ..planning.globs import quoted
from ..planning.plan import Plan, PlannedLayer
from ..planning.rules import Rule, Unfreeze
from ..planning.sites import Sites, Wanted, half_shared, lazy_modules, own_parameters
from ..planning.spec import Spec
from .install import Built, build

_MOST_NAMED = 12  # problems in one error
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Given:
    """One adapter beside one layer, with its values.

    Attributes:
        kind: of adapter.
        options: that are not the kind's defaults.
        tensors: values, by the names in the adapter's state_dict.
    """

    kind: str
    options: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Prepared:
    """An adapter with its values, ready to be installed; the model has not been touched.

    Attributes:
        plan: the report.
        record: what the model will keep of it.
        built: adapters and unfrozen tensors.
    """

    plan: Plan
    record: AdapterRecord
    built: Built


def prepare(
    root: nn.Module,
    given: Mapping[str, Given],
    owned: Mapping[str, Mapping[str, Tensor]],
    *,
    heading: str,
    error: type[ConvPeftError] = SpecError,
    dtype: torch.dtype | None = None,
) -> Prepared:
    """Return what ``install`` takes for adapters with known values; everything that can be wrong is found here.

    The adapters keep the dtype of their layers. Beside a layer in half precision they get float32, unless their values are
    in its very dtype: nothing is rounded away.

    Args:
        root: that is to hold the records.
        given: adapters by layer.
        owned: values of unfrozen modules, by module and tensor. Tensors that are not named are the base's.
        heading: of the error.
        error: its class.
        dtype: of the adapters; unset, see above.

    Raises:
        ConvPeftError: ``error``, with all that keeps this model from taking them.
    """
    modules, unique = dict(base_modules(root)), dict(unique_modules(root))
    problems = [f"{brief(key)}: not in this model" for key in [*given, *owned] if key not in modules]
    problems += filter(None, [lazy_modules(unique)])
    problems += [*_doubles(modules, given), *_doubles(modules, owned), *_owned_problems(modules, owned)]
    groups = _groups(given)
    wanted = list(_wanted(modules, given, groups, problems))
    sites = Sites(root, wanted, bypassed(unique.values()))
    problems += sites.problems + half_shared(unique, {key: modules[key] for key in owned if key in modules})
    for layer in sites.layers:
        problems += _tensor_problems(layer, sites, given[layer.name])
    if problems:
        listed = "; ".join(map(brief, problems[:_MOST_NAMED]))
        more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise error(f"{heading} does not fit this {base_class(root).__name__}; the model is unchanged. {listed}{more}")

    def value_of(name: str, key: str, old: Tensor) -> Tensor:
        value = owned[name].get(key)
        return old.detach().clone() if value is None else _cast(value, old.device, old.dtype, f"{name}.{key}", error)

    built = _filled(modules, sites.layers, given, list(owned), value_of, dtype, error)
    spec = _spec(groups, list(owned))
    plan = _plan(root, sites.layers, list(owned), spec)
    record = AdapterRecord(
        plan.spec, {layer.name: layer.record() for layer in plan.layers}, dict(plan.owned), plan.norm
    )
    return Prepared(plan, record, built)


def _groups(given: Mapping[str, Given]) -> list[tuple[Given, list[str]]]:
    """Return layers of the same kind and options together: one rule of the spec for each."""
    found: dict[str, tuple[Given, list[str]]] = {}
    for name, each in given.items():
        found.setdefault(repr((each.kind, sorted(each.options.items()))), (each, []))[1].append(name)
    return list(found.values())


def _wanted(
    modules: Mapping[str, nn.Module],
    given: Mapping[str, Given],
    groups: list[tuple[Given, list[str]]],
    problems: list[str],
) -> Iterator[Wanted]:
    """Yield the adapters whose module is there; ``problems`` takes what is wrong with the others."""
    for rule, (like, names) in enumerate(groups, 1):
        try:
            options, found = read_options(like.kind, adapter_class(like.kind).Options, like.options)
        except SpecError as unknown:
            options, found = None, [unknown]  # type: ignore[list-item]
        problems += [f"{names[0]}: {problem}" for problem in found]
        if options is not None:
            for name in names:
                if name in modules:
                    yield Wanted(name, modules[name], "", like.kind, "parallel", options, rule, 1.0, None)


def _doubles(modules: Mapping[str, nn.Module], names: Mapping[str, Any]) -> Iterator[str]:
    first: dict[int, str] = {}
    for name in names:
        if name in modules and first.setdefault(id(modules[name]), name) != name:
            yield f"{name}: the same module as {first[id(modules[name])]}"


def _owned_problems(modules: Mapping[str, nn.Module], owned: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    for name, values in owned.items():
        here = tensors_of(modules[name], BASE) if name in modules else {}
        for key, value in values.items():
            if name in modules and key not in here:
                yield f"{name} has no tensor {brief(key)} that can be unfrozen"
            elif key in here and value.shape != here[key].shape:
                yield f"{name}.{key} is {tuple(value.shape)}, {tuple(here[key].shape)} here"


def _tensor_problems(layer: PlannedLayer, sites: Sites, given: Given) -> Iterator[str]:
    here = sites.draft(layer.kind, layer.site, layer.options).state_dict()
    yield from (f"{layer.name}: {key} is missing" for key in here if key not in given.tensors)
    yield from (f"{layer.name}: {brief(key)} is not expected" for key in given.tensors if key not in here)
    for key in here.keys() & given.tensors.keys():
        value = given.tensors[key]
        if value.shape != here[key].shape:
            yield f"{layer.name}: {key} is {tuple(value.shape)}, and kind {layer.kind!r} makes {tuple(here[key].shape)}"
        elif value.is_floating_point() != here[key].is_floating_point():
            yield f"{layer.name}: {key} is {value.dtype}, and kind {layer.kind!r} makes {here[key].dtype}"


def _filled(
    modules: Mapping[str, nn.Module],
    layers: list[PlannedLayer],
    given: Mapping[str, Given],
    owned: list[str],
    value_of: Any,
    dtype: torch.dtype | None,
    error: type[ConvPeftError],
) -> Built:
    """Return the parts of an adapter with their values."""
    with torch.random.fork_rng(devices=[]):
        built = build(modules, layers, owned, value_of, dtype)
    for name, adapter in built.adapters.items():
        values = given[name].tensors
        floating = [value.dtype for value in values.values() if value.is_floating_point()]
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            target = tensor.dtype
            if dtype is None and target in _HALVES and any(each != target for each in floating):
                target = torch.float32 if tensor.is_floating_point() else target
            tensor.data = _cast(values[key], tensor.device, target, f"{name}: {key}", error)
    return built


def _cast(value: Tensor, device: torch.device, dtype: torch.dtype, label: str, error: type[ConvPeftError]) -> Tensor:
    made = value.detach().to(device, dtype, copy=True)
    if not torch.equal(made.isfinite().cpu(), value.isfinite().cpu()):
        raise error(f"{label} overflows {dtype}; the model is unchanged")
    return made


def _spec(groups: list[tuple[Given, list[str]]], owned: list[str]) -> Spec:
    """Return a spec that asks for the same adapters."""
    rules = [Rule(tuple(map(quoted, names)), like.kind, **like.options) for like, names in groups]
    return Spec(rules=rules, unfreeze=[Unfreeze(tuple(map(quoted, owned)))] if owned else [])


def _plan(root: nn.Module, layers: list[PlannedLayer], owned: list[str], spec: Spec) -> Plan:
    unique, modules = unique_modules(root), dict(base_modules(root))
    base = {id(p): p.numel() for _, module in unique for p in own_parameters(module)}
    trained = {id(p): p.numel() for name in owned for p in own_parameters(modules[name])}
    return Plan(
        base_class(root).__name__, tuple(layers), dict.fromkeys(owned, 1.0), (), (), "frozen", sum(base.values()),
        sum(trained.values()), spec.to_dict(),
    )  # fmt: skip
