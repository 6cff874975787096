"""Fold adapters into plain layers: work out every layer, probe every layer, and only then touch the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import GeometryError, MergeError, OptionError
from ..hosts.buffers import forget, remember
from ..hosts.chains import attach_chains, set_bias
from ..hosts.journal import Journal, all_modules, all_parameters, named_parameters
from ..hosts.kept import users_modules
from ..hosts.model import ATTRIBUTE, AdaptedModel
from ..hosts.modules import base_modules, device_and_dtype, last_step
from ..hosts.rewriting import mentioned
from ..hosts.transaction import change, with_normal_tensors
from ..hosts.transactions import protect
from ..hosts.trials import deep_copy, set_requires_grad
from ..hosts.unfrozen import keep_shown
from .attaching import chain_refusal
from .forms import Job, Merged, solve
from .plan import FORMS, MergePlan, MergeRow
from .probe import probe
from .verification import compare_outputs, double_copy, read_past


def plan_merge(model: nn.Module, *, form: str = "auto", example_inputs: Any = None) -> MergePlan:
    """Return how each layer with active adapters would merge; the model is not touched.

    Args:
        model: an injected model.
        form: ``auto`` (fewer multiply-accumulates), ``single`` (one kernel) or ``factored`` (a chain of plain layers).
        example_inputs: of the model (a tensor, or a tuple of positional inputs), to run it once and see whose weights are
            read by others; unset, only the source of the forward passes tells.

    Raises:
        StateError: if nothing is injected.
    """
    adapted = AdaptedModel.of(model)
    _check_form(form)
    past = _read_past(model, example_inputs)
    rows = [MergeRow.of(part.job, part.merged) for part in _work_out(adapted, form, past)]
    return MergePlan(tuple(rows), adapted.state.active)


@with_normal_tensors
def merge(
    model: nn.Module, *, form: str = "auto", inplace: bool = False, strict: bool = True, example_inputs: Any = None
) -> nn.Module:
    """Return the model with its active adapters folded into plain layers (a copy, unless ``inplace``).

    Every layer is worked out in float64, probed against the adapted layer on a random input, and cast once; only when
    all of them agree is anything changed. Merged layers are of the base's exact classes. A ``factored`` layer keeps its
    own kernel and gets a chain of plain convolutions as a child (``beside`` it, with its bias, or ``after`` it), added
    by a forward hook; ``form="single"`` leaves no trace at all. Inactive adapters are dropped.

    Args:
        model: an injected model, or one around it.
        form: see ``plan_merge``.
        inplace: change the given model, to save memory.
        strict: refuse if any layer cannot merge; otherwise such layers stay adapted.
        example_inputs: of the model, to verify the merge on: layers whose weights are read by others as it runs are
            refused, and the merged model must give what the adapted one gives, both in float64.

    Raises:
        MergeError: naming every layer that cannot merge, with its reason; the model is as it was.
        StateError: if nothing is injected (a merged model has no adapters left); in place, while another thread runs it.
    """
    adapted = AdaptedModel.of(model)
    adapted.require_unrouted()
    _check_form(form)
    adapted.check_restorable()
    with torch.inference_mode(False):  # the merged model is one to train and to save, whatever the caller is in
        past = _read_past(model, example_inputs)
        if example_inputs is not None:
            exact = double_copy(model)
            compare_outputs(exact, _merged(deep_copy(exact), form, strict, past), example_inputs)
        return _merged(model if inplace else deep_copy(model), form, strict, past)


def _merged(model: nn.Module, form: str, strict: bool, past: Mapping[str, str]) -> nn.Module:
    """Merge a model in place, and return it; ``past`` are the layers that others read, with the reasons."""
    adapted = AdaptedModel.of(model)
    parts = _work_out(adapted, form, past)
    reasons = {part.job.name: part.merged.reason for part in parts if part.merged.form == "kept"}
    if reasons and strict:
        lines = "\n".join(f"  {name or '(root)'}: {reason}" for name, reason in reasons.items())
        raise MergeError(
            f"{len(reasons)} of {len(parts)} layers cannot merge; the model is unchanged.\n{lines}\n"
            "merge(model, strict=False) merges the others and keeps these adapted.",
            reasons,
        )

    taken = mentioned(model) if any(part.chains for part in parts) else set()

    def work(journal: Journal) -> None:
        for module in all_modules(model).values():
            journal.keep_module(module, whole=True)
        state = adapted.state
        journal.keep(state.__dict__, state.adapters, state.swapped, state.phase.__dict__)
        for record in state.adapters.values():
            journal.keep(record.__dict__, record.owned)
        for parameter in all_parameters(model):
            journal.keep_flag(parameter)
        _drop_adapters(adapted, set(reasons), journal)
        for part in parts:
            if part.merged.form != "kept":
                _write(part, taken)
        protect(adapted.root, journal)

    slots = [adapted.slots(key) for key in adapted.state.swapped]
    change(adapted.root, adapted.state, work, slots, since=adapted.since)
    return model


@dataclass(frozen=True)
class _Part:
    """One adapted layer, worked out and probed: the merged layer, or the chains to add; neither where it is kept."""

    job: Job
    merged: Merged
    layer: nn.Module | None = None
    chains: tuple[nn.Sequential, ...] = ()


def _read_past(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    return read_past(model, {job.target_name: job.target for job in _jobs(AdaptedModel.of(model))}, example_inputs)


def _work_out(adapted: AdaptedModel, form: str, past: Mapping[str, str]) -> list[_Part]:
    """Work out and probe every layer with active adapters; what cannot merge is ``kept``, with the reason."""
    parts: list[_Part] = []
    for job in _jobs(adapted):
        merged = solve(job, form)
        if job.target_name in past and merged.form != "kept" and merged.beside:
            merged = merged.kept(past[job.target_name])
        if merged.form == "kept":
            parts.append(_Part(job, merged))
            continue
        try:
            merged, layer, chains = _probed(job, merged)
            _cast(job, layer, chains, adapted.root)
            parts.append(_Part(job, merged, layer, tuple(chains)))
        except (MergeError, GeometryError) as error:
            parts.append(_Part(job, merged.kept(str(error))))
    return parts


def _probed(job: Job, merged: Merged) -> tuple[Merged, nn.Module | None, list[nn.Sequential]]:
    """Return the form that passes the probe, and its parts: a layer that computes more than its kernel says takes a chain."""
    try:
        return (merged, *probe(job, merged))
    except MergeError as error:
        chain = merged.otherwise
        if chain is None:
            raise
        try:
            parts = probe(job, chain)
        except MergeError:
            raise error from None  # what was tried first says more
        return (replace(chain, reason="its forward is more than the convolution of its weight"), *parts)


def _jobs(adapted: AdaptedModel) -> list[Job]:
    """Return every layer with active adapters, and the module that would take the merged result."""
    modules = base_modules(adapted.root)
    order = {name: number for number, (name, _) in enumerate(modules)}
    count = Counter(id(module) for _, module in modules)
    on: dict[str, list[str]] = {}
    for name in adapted.state.active:
        for key in adapted.record(name).layers:
            on.setdefault(key, []).append(name)
    jobs: list[Job] = []
    taken: set[int] = set()
    for name in sorted(on, key=order.__getitem__):
        layer = adapted.module(name)
        target_name, target = last_step(name, layer)
        is_taken = target_name in on or id(target) in taken or count[id(target)] > 1
        if target is not layer and (is_taken or isinstance(target, torch.jit.ScriptModule)):
            target_name, target = name, layer
        taken.add(id(target))
        entry = adapted.record(on[name][0]).layers[name].output
        jobs.append(
            Job(name, target_name, layer, target, tuple(adapted.adapter(name, each) for each in on[name]), entry)
        )
    return jobs


def _cast(job: Job, layer: nn.Module | None, chains: list[nn.Sequential], root: nn.Module) -> None:
    """Bring float64 parts to the host's device and dtype, in place: the one rounding of a merge."""
    refusal = chain_refusal(job.target) if layer is None else None
    if refusal:
        raise MergeError(refusal)
    device, dtype = device_and_dtype(job.layer, root)  # not that of the adapters, which may be another
    parts: list[nn.Module] = [*chains] if layer is None else [layer, *chains]
    for part in parts:
        part.to(device=device, dtype=dtype)
    if not all(torch.isfinite(p).all() for part in parts for p in part.parameters()):
        raise MergeError(f"its merged weights overflow {dtype}")


def _drop_adapters(adapted: AdaptedModel, kept: set[str], journal: Journal) -> None:
    """Take all adapters out but those on ``kept`` layers, in place; what the active ones unfroze becomes the base's own."""
    state = adapted.state
    for name, record in state.adapters.items():
        for key in record.layers:
            if name not in state.active or key not in kept:
                adapted.slots(key).take_out(name)
    for key in state.swapped:
        keep_shown(adapted.module(key))
    forget(users_modules(adapted.root))
    if not kept:
        adapted.restore(state.swapped)
        del adapted.root.__dict__[ATTRIBUTE]
        for key, parameter in named_parameters(adapted.root):
            set_requires_grad(parameter, state.requires_grad.get(key, False))
        return
    for name in list(state.adapters):
        record = state.adapters[name]
        record.owned.clear()
        record.layers = {key: layer for key, layer in record.layers.items() if key in kept}
        if name not in state.active or not record.layers:
            del state.adapters[name]
    state.active = tuple(name for name in state.active if name in state.adapters)
    state.phase.active = state.active
    remember(users_modules(adapted.root), state.phase, journal)
    adapted.restore([key for key in state.swapped if _is_bare(adapted, key)])


def _is_bare(adapted: AdaptedModel, name: str) -> bool:
    """Return whether a swapped module has no adapter and no norm to hold."""
    return adapted.slots(name).is_idle() and name not in adapted.state.norms


def _write(part: _Part, taken: Set[str]) -> None:
    """Write the merged parts onto the target, in place; ``taken`` are names that no new child may have."""
    target: Any = part.job.target
    if part.layer is None:
        attach_chains(target, part.chains, beside=part.merged.beside, entry=part.job.entry, taken=taken)
        return
    assert part.merged.kernel is not None
    layer: Any = part.layer
    part.merged.kernel.geometry.imprint(target)
    target.weight = nn.Parameter(layer.weight.detach(), requires_grad=target.weight.requires_grad)
    if part.merged.kernel.bias is not None:
        bias = part.merged.kernel.bias.to(layer.weight)
        set_bias(target, nn.Parameter(bias, requires_grad=target.weight.requires_grad))


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise OptionError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
