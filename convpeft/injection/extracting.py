"""Make an adapter of the difference between a base and a model that was fine-tuned from it as a whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Site
from ..adapters.lora import Lora
from ..adapters.options import read_options
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry
from ..convolution.kernels import ConvKernel, compose
from ..convolution.modes import making_on
from ..convolution.precision import floating_dtype
from ..convolution.spectrum import Spectrum
from ..errors import HostError, OptionError, SpecError, StateError, shortened, shown
from ..hosts.model import AdaptedModel, whole
from ..hosts.modules import unique_modules
from ..hosts.slots import BASE, base_class
from ..hosts.trainers import guard_trainers
from ..hosts.transaction import with_normal_tensors
from ..hosts.unfrozen import tensors_of
from ..hosts.wrappers import refuse_parallel
from ..planning.bypasses import bypassed
from ..planning.examples import ExampleFailed, call_example
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.sites import Sites, Wanted, own_parameters
from ..planning.spec import SpecLike, as_spec
from .extraction import ExtractedLayer, Extraction
from .inject import eject
from .install import check_name, install
from .ranks import Choice, Costs, allocate
from .values import Given, prepare

_COUNTERS = ("num_batches_tracked",)  # how often a norm was updated changes no output
_ROUNDING = 1e-26  # of squared singular values, in float64


@with_normal_tensors
def extract(
    model: nn.Module,
    fine_tuned: nn.Module | Mapping[str, Tensor],
    *,
    spec: SpecLike | None = None,
    budget: int | float | None = None,
    energy: float | None = None,
    name: str = "default",
    batches: Iterable[Any] | None = None,
    lean: bool = True,
    dtype: torch.dtype | str | None = None,
) -> Extraction:
    """Put the difference of a fine-tuned model to this base into the model as an adapter, in place, and return a report.

    The change of each convolution and linear layer becomes a ``lora`` by its singular values, in float64 and in the layer's
    own geometry; grouped layers block by block. With ``budget`` or ``energy`` the ranks are chosen over all layers
    together, always the one that keeps most for its parameters, and whatever is no such layer, or is smaller than its
    adapter would be, is taken whole, as unfrozen tensors. A ``spec`` says layers, ranks and unfrozen modules itself. The
    result is an adapter like any other, and the active one: it trains on, is saved, switched and merged.

    Args:
        model: the base; exactly one of ``spec``, ``budget`` and ``energy`` says how much to take.
        fine_tuned: a model of the same modules, or its ``state_dict``.
        spec: with rules of kind ``lora``.
        budget: parameters of the adapter, everything included; below 1: share of the base's.
        energy: share of the change to keep, of its squared norm, above 0 and at most 1.
        name: of the adapter.
        batches: inputs for the base, each as ``example_inputs`` of ``plan``. With them a channel's change counts by the
            channel's root mean square over these inputs, so that the output is kept, not the weights.
        lean: see ``inject``.
        dtype: of the adapters' parameters; unset, that of their layers.

    Raises:
        SpecError: if the options do not go together, the two models have other tensors, do not differ, or the budget is
            smaller than what has to be taken whole; the model is unchanged.
        StateError: if the name is taken, or the fine-tuned model has adapters.

    Reference: truncated decompositions, see ``convolution.spectrum``; weights by activations as in Yuan et al., ASVD,
    arXiv:2312.05821.
    """
    root, wanted = whole(model), floating_dtype(dtype)
    _check_options(spec, budget, energy)
    check_name(root, name)
    refuse_parallel(root)
    guard_trainers(map(type, root.modules()))
    modules = dict(unique_modules(root))
    changes, theirs = _changes(modules, fine_tuned, set(root.state_dict()), base_class(root).__name__)
    planned = None if spec is None else make_plan(root, as_spec(spec))
    adaptable = _adaptable(root, modules, changes) if planned is None else {layer.name for layer in planned.layers}
    scales = {} if batches is None else _channel_scales(root, adaptable, batches)
    spectra = {
        key: Spectrum.of(_kernel(modules[key], own["weight"]), ConvGeometry.of(modules[key]).groups, scales.get(key))
        for key, own in changes.items()
        if key in adaptable and "weight" in own
    }
    if planned is None:
        choices = _choices(modules, changes, spectra, budget, 1.0 if energy is None else energy)
        options = {
            key: {"rank": choice.rank * ConvGeometry.of(modules[key]).groups} | _bias_option(changes[key])
            for key, choice in choices.items()
            if choice.rank
        }
        owned = [key for key in changes if key not in choices or choices[key].whole]
    else:
        options = _options_of(planned)
        owned = list(planned.owned)
    given = {key: _given(modules[key], values, spectra.get(key), changes.get(key)) for key, values in options.items()}
    values = {key: theirs.get(key, {}) for key in owned}
    prepared = prepare(root, given, values, heading="the adapter", dtype=wanted)
    layers = tuple(_report(key, own, spectra, modules, prepared.built.adapters, owned) for key, own in changes.items())
    install(root, name, prepared.record, prepared.built, lean=lean)
    unreached = [key for key in spectra if batches is not None and key not in scales]
    return Extraction(prepared.plan, layers, tuple(unreached))


def _check_options(spec: SpecLike | None, budget: float | None, energy: float | None) -> None:
    given = [key for key, value in (("spec", spec), ("budget", budget), ("energy", energy)) if value is not None]
    if len(given) != 1:
        raise OptionError(f"extract takes one of spec=, budget= and energy=, not {' and '.join(given) or 'none'}")
    for key, value, most in (("budget", budget, math.inf), ("energy", energy, 1.0)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value <= most):
            raise OptionError(
                f"{key} must be a number above 0{' and at most 1' if most == 1 else ''}, not {shown(value)}"
            )


def _changes(
    modules: Mapping[str, nn.Module], fine_tuned: nn.Module | Mapping[str, Tensor], known: set[str], model: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Return, by module, the float64 difference of each tensor that differs, and the fine-tuned tensors themselves.

    Counters of norm updates do not count.

    Args:
        modules: of the base.
        fine_tuned: see ``extract``.
        known: keys that may be there besides: second names of shared modules.
        model: the class, for errors.
    """
    theirs = _tensors_by_key(fine_tuned)
    ours = {_key(name, key): (name, key, t) for name, m in modules.items() for key, t in tensors_of(m, BASE).items()}
    problems = [f"{key} is missing in it" for key in ours if key not in theirs]
    problems += [f"{key} is not in the base" for key in theirs if key not in ours and key not in known]
    changes: dict[str, dict[str, Tensor]] = {}
    values: dict[str, dict[str, Tensor]] = {}
    for key, (name, last, tensor) in ours.items():
        other = theirs.get(key)
        if not isinstance(other, Tensor):
            problems += [] if other is None else [f"{key} is a {type(other).__name__}"]
        elif other.shape != tensor.shape:
            problems.append(f"{key} is {tuple(other.shape)} in it, and {tuple(tensor.shape)} in the base")
        elif last not in _COUNTERS:
            change = other.detach().cpu().double() - tensor.detach().cpu().double()
            if not change.isfinite().all():
                problems.append(f"{key} is not finite")
            elif change.any():
                changes.setdefault(name, {})[last] = change
                values.setdefault(name, {})[last] = other.detach()
    if problems:
        raise SpecError(
            f"the fine-tuned model is not one of this {model}; the base is unchanged. {shortened(problems)}"
        )
    if not changes:
        raise SpecError("the two models do not differ: there is nothing to extract")
    return changes, values


def _tensors_by_key(fine_tuned: nn.Module | Mapping[str, Tensor]) -> dict[str, Any]:
    """Return all tensors of a model, or of its state_dict, by their keys in it."""
    if not isinstance(fine_tuned, nn.Module):
        if not isinstance(fine_tuned, Mapping):
            raise SpecError(f"the fine-tuned model is a module or a state_dict, not a {type(fine_tuned).__name__}")
        return dict(fine_tuned)
    if AdaptedModel.find(fine_tuned) is not None:
        raise StateError("the fine-tuned model has adapters of convpeft: merge or eject them first")
    found = unique_modules(fine_tuned)
    return {_key(name, key): tensor for name, module in found for key, tensor in tensors_of(module, BASE).items()}


def _key(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _adaptable(
    root: nn.Module, modules: Mapping[str, nn.Module], changes: Mapping[str, Mapping[str, Tensor]]
) -> set[str]:
    """Return the changed layers that can have a ``lora`` beside them."""
    options, _ = read_options("lora", Lora.Options, {"rank": 1})
    assert options is not None
    plain = [
        key for key, own in changes.items() if isinstance(modules[key], PLAIN_HOSTS) and set(own) <= {"weight", "bias"}
    ]
    wanted = [Wanted(key, modules[key], "", "lora", "parallel", options, 1, 1.0, None) for key in plain]
    return {layer.name for layer in Sites(root, wanted, bypassed(modules.values())).layers}


def _channel_scales(root: nn.Module, layers: set[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the root mean square of each input channel of some layers, by running a copy of the base on the batches."""
    bare = eject(copy.deepcopy(root)).eval()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(key: str, axis: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not inputs:
                return
            x = inputs[0].detach().double().movedim(axis, 0).flatten(1)
            sums[key] = sums.get(key, 0) + x.square().sum(1).cpu()
            counts[key] = counts.get(key, 0) + x.shape[1]

        return hook

    for key, module in unique_modules(bare):
        if key in layers:
            module.register_forward_pre_hook(watch(key, -1 if ConvGeometry.of(module).linear else -3))
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):
            try:
                call_example(bare, batch)
            except ExampleFailed as error:
                raise HostError(f"the base does not run on batch {number}: {error}; the model is unchanged") from error
    return {key: (total / max(1, counts[key])).sqrt() for key, total in sums.items() if total.any()}


def _kernel(module: nn.Module, weight: Tensor) -> Tensor:
    return ConvGeometry.of(module).as_kernel(weight)


def _choices(
    modules: Mapping[str, nn.Module],
    changes: Mapping[str, Mapping[str, Tensor]],
    spectra: Mapping[str, Spectrum],
    budget: float | None,
    energy: float,
) -> dict[str, Choice]:
    """Return what each adaptable layer gets, after all else that changed was taken whole."""
    base = {id(p): p.numel() for module in modules.values() for p in own_parameters(module)}
    sizes = {key: sum(p.numel() for p in own_parameters(modules[key])) for key in changes if key not in spectra}
    most = math.inf if budget is None else budget * sum(base.values()) if budget < 1 else budget
    if sum(sizes.values()) > most:
        largest = sorted(sizes, key=lambda key: -sizes[key])
        raise SpecError(
            f"a budget of {int(most):,} parameters is too small: {sum(sizes.values()):,} are in modules that are taken whole "
            f"({shortened(largest, 3)}); the model is unchanged"
        )
    costs = {
        key: Costs(
            _above_rounding(spectrum.energies().tolist()),
            spectrum.unit,
            float(changes[key]["bias"].square().sum()) if "bias" in changes[key] else 0.0,
            changes[key]["bias"].numel() if "bias" in changes[key] else 0,
            sum(p.numel() for p in own_parameters(modules[key])),
        )
        for key, spectrum in spectra.items()
    }
    return allocate(costs, most - sum(sizes.values()), energy)


def _above_rounding(energies: list[float]) -> list[float]:
    """Return the energies of ranks, those set to 0 that the rounding of the largest one explains."""
    return [each if each > _ROUNDING * energies[0] else 0.0 for each in energies]


def _bias_option(change: Mapping[str, Tensor]) -> dict[str, bool]:
    return {"bias": True} if "bias" in change else {}


def _options_of(planned: Plan) -> dict[str, dict[str, Any]]:
    """Return the options of the adapters that a spec asks for, by layer."""
    wrong = [
        layer.name
        for layer in planned.layers
        if layer.kind != "lora" or layer.site.place != "parallel" or layer.options.dora or layer.options.pointwise  # type: ignore[attr-defined]
    ]
    if wrong:
        raise SpecError(
            f"extract makes plain lora beside layers; the spec asks for something else at {shortened(wrong)}"
        )
    return {layer.name: layer.record().options for layer in planned.layers}


def _given(
    module: nn.Module, options: dict[str, Any], spectrum: Spectrum | None, change: Mapping[str, Tensor] | None
) -> Given:
    """Return the adapter that takes the change of a layer, as far as its rank goes."""
    read, problems = read_options("lora", Lora.Options, options)
    if read is None:
        raise problems[0]
    geometry = ConvGeometry.of(module)
    with making_on(torch.device("meta")):
        draft = Lora(Site("parallel", geometry), read)  # type: ignore[arg-type]
    values = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in draft.state_dict().items()}
    if spectrum is not None:
        rank = draft.up.shape[1]
        down, up = spectrum.factors(min(rank, spectrum.full_rank))
        values["down"].unflatten(0, (geometry.groups, rank))[:, : spectrum.full_rank] = down.unflatten(
            0, (geometry.groups, -1)
        )
        values["up"][:, : spectrum.full_rank] = up / draft.scale
    if change is not None and "bias" in change and "bias" in values:
        values["bias"] = change["bias"]
    return Given("lora", options, values)


def _report(
    key: str,
    change: Mapping[str, Tensor],
    spectra: Mapping[str, Spectrum],
    modules: Mapping[str, nn.Module],
    adapters: Mapping[str, Any],
    owned: list[str],
) -> ExtractedLayer:
    """Return what became of the change of a module."""
    total = math.sqrt(sum(float(each.square().sum()) for each in change.values()))
    full = spectra[key].full_rank if key in spectra else 0
    if key in owned:
        size = sum(p.numel() for p in own_parameters(modules[key]))
        return ExtractedLayer(key, "whole", 0, full, size, total, 0.0)
    if key not in adapters:
        return ExtractedLayer(key, "left", 0, full, 0, total, total)
    adapter = adapters[key]
    taken = compose([ConvKernel(step.weight.cpu(), None, step.geometry) for step in adapter.chain()]).weight
    rest = float((_kernel(modules[key], change["weight"]) - taken).square().sum()) if "weight" in change else 0.0
    if "bias" in change:
        bias = 0.0 if adapter.bias is None else adapter.bias.detach().double().cpu()
        rest += float((change["bias"] - bias).square().sum())
    size = sum(p.numel() for p in adapter.parameters())
    return ExtractedLayer(key, "lora", adapter.up.shape[1], full, size, total, math.sqrt(rest))
