"""Fold adapters into plain layers: plan every layer, probe every layer, and only then touch the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import hosting
from .chains import hang, refuse_fusing, set_bias
from .copying import copied
from .errors import GeometryError, MergeError, OptionError
from .exchanging import check_classes
from .folding import Fold, fold_parts, put_folds
from .injection import switchable
from .merge_forms import Form, Job, Merged, probe, solve
from .reports import table
from .state import ATTRIBUTE, ModelState, adapter_at, module_at, require_hosts, require_state, slots_at
from .verifying import compare_outputs, double_copy, read_past

FORMS = ("auto", "single", "factored")


@dataclass(frozen=True)
class MergeRow:
    """How one layer merges.

    Attributes:
        name: of the adapted module.
        form: ``absorbed`` into its kernel, one larger ``single`` kernel, a ``factored`` chain of plain layers, or ``kept``.
        kernel_before, kernel_after: in words.
        macs_before, macs_after: multiply-accumulates for one output position (0 before, for a block's output).
        macs_single, macs_factored: what either form would cost; None where there is no such form.
        reason: why this form, or why it cannot merge.
    """

    name: str
    form: Form
    kernel_before: str
    kernel_after: str
    macs_before: int
    macs_after: int | None
    macs_single: int | None
    macs_factored: int | None
    reason: str


@dataclass(frozen=True)
class MergePlan:
    """What ``merge`` would do with each layer; print it.

    Attributes:
        rows: in module order.
        active: the adapters that would be merged.
    """

    rows: tuple[MergeRow, ...]
    active: tuple[str, ...]

    @property
    def refused(self) -> dict[str, str]:
        """Layers that cannot merge, with the reasons."""
        return {row.name: row.reason for row in self.rows if row.form == "kept"}

    def __str__(self) -> str:
        forms = Counter(row.form for row in self.rows)
        counts = ", ".join(f"{count} {form}" for form, count in forms.items()) or "no adapted layers"
        head = f"merge of {', '.join(self.active) or 'the bare base'}: {counts}; MACs are for one output position"
        cells = [
            (
                r.name or "(root)",
                r.form,
                r.kernel_before,
                r.kernel_after,
                f"{r.macs_before:,}",
                *map(_count, (r.macs_after, r.macs_single, r.macs_factored)),
                r.reason,
            )
            for r in self.rows
        ]
        titles = (
            "layer",
            "form",
            "kernel before",
            "kernel after",
            "MACs before",
            "after",
            "if single",
            "if factored",
            "why",
        )
        return f"{head}\n{table(titles, cells)}" if cells else head


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
    root, state = require_state(model)
    _check_form(form)
    past = _read_past(model, example_inputs)
    rows = [_row(part.job, part.merged) for part in _work_out(root, state, form, past)]
    return MergePlan(tuple(rows), state.active)


def _row(job: Job, merged: Merged) -> MergeRow:
    return MergeRow(
        job.name,
        merged.form,
        merged.before,
        merged.after,
        merged.macs_before,
        None if merged.form == "kept" else merged.macs_after,
        merged.macs_single,
        merged.macs_factored,
        merged.reason,
    )


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
        strict: refuse if any layer cannot merge; otherwise such layers stay adapted, with what is linear in their
            adapters folded (the plan says what).
        example_inputs: of the model, to verify the merge on: layers whose weights are read by others as it runs are
            refused, and the merged model must give what the adapted one gives, both in float64.

    Raises:
        MergeError: naming every layer that cannot merge, with its reason; the model is as it was.
        StateError: if nothing is injected (a merged model has no adapters left).
    """
    root, state = require_state(model)
    switchable(state)
    _check_form(form)
    require_hosts(root, state)
    check_classes(root, state.swapped)
    past = _read_past(model, example_inputs)
    if example_inputs is not None:
        adapted = double_copy(model)
        compare_outputs(adapted, _merged(copied(adapted), form, strict, past), example_inputs)
    return _merged(model if inplace else copied(model), form, strict, past)


def _merged(model: nn.Module, form: str, strict: bool, past: dict[str, str]) -> nn.Module:
    """Merge a model in place, and return it; ``past`` are the layers that others read, with the reasons."""
    root, state = require_state(model)
    parts = _work_out(root, state, form, past)
    reasons = {part.job.name: part.merged.reason for part in parts if part.merged.form == "kept"}
    if reasons and strict:
        lines = "\n".join(f"  {name or '(root)'}: {reason}" for name, reason in reasons.items())
        raise MergeError(
            f"{len(reasons)} of {len(parts)} layers cannot merge; the model is unchanged.\n{lines}\n"
            "merge(model, strict=False) merges the others and keeps these adapted.",
            reasons,
        )
    _drop_adapters(root, state, set(reasons))
    for part in parts:
        if part.merged.form == "kept":
            put_folds(part.job.layer, part.folds)
        else:
            _put(part)
    refuse_fusing(model)
    return model


@dataclass(frozen=True)
class _Part:
    """One adapted layer, worked out and probed: the merged layer, the chains to add, or the folded adapters that stay."""

    job: Job
    merged: Merged
    layer: nn.Module | None = None
    chains: tuple[nn.Sequential, ...] = ()
    folds: tuple[Fold, ...] = ()


def _read_past(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    return read_past(model, {job.target_name: job.target for job in _jobs(*require_state(model))}, example_inputs)


def _work_out(root: nn.Module, state: ModelState, form: str, past: dict[str, str]) -> list[_Part]:
    """Work out and probe every layer with active adapters; what cannot merge is ``kept``, with the reason."""
    parts: list[_Part] = []
    for job in _jobs(root, state):
        merged = solve(job, form)
        if job.target_name in past and merged.form != "kept" and merged.beside:
            merged = merged.kept(past[job.target_name])
        try:
            if merged.form != "kept":
                merged, layer, chains = _probed(job, merged)
                layer, chains = _cast(job, layer, chains)
                parts.append(_Part(job, merged, layer, tuple(chains)))
                continue
        except (MergeError, GeometryError) as error:
            merged = merged.kept(str(error))
        folds = fold_parts(job)
        reason = "; ".join(dict.fromkeys([merged.reason, *(fold.what for fold in folds)]))
        parts.append(_Part(job, merged.kept(reason), folds=folds))
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


def _jobs(root: nn.Module, state: ModelState) -> list[Job]:
    """Return every layer with active adapters, and the module that would take the merged result."""
    names = [name for name, _ in hosting.base_modules(root)]
    adapted = {key for active in state.active for key in state.adapters[active].layers}
    jobs: list[Job] = []
    for name in sorted(adapted, key=names.index):
        layer = module_at(root, name)
        adapters = tuple(adapter_at(root, name, a) for a in state.active if name in state.adapters[a].layers)
        entries = [state.adapters[a].layers[name].output for a in state.active if name in state.adapters[a].layers]
        target_name, target = name, layer
        while getattr(hosting.base_class(target), "forward", None) is nn.Sequential.forward and len(target):  # type: ignore[arg-type]
            step = [key for key in target._modules if key != hosting.SLOT][-1]
            target_name = f"{target_name}.{step}" if target_name else step
            target = target._modules[step]  # type: ignore[assignment]
        taken = target_name in adapted or any(job.target is target for job in jobs) or _is_shared(root, target)
        if target is not layer and (taken or isinstance(target, torch.jit.ScriptModule)):
            target_name, target = name, layer
        jobs.append(Job(name, target_name, layer, target, adapters, entries[0]))
    return jobs


def _is_shared(root: nn.Module, module: nn.Module) -> bool:
    return sum(other is module for _, other in hosting.base_modules(root)) > 1


def _cast(
    job: Job, layer: nn.Module | None, chains: list[nn.Sequential]
) -> tuple[nn.Module | None, list[nn.Sequential]]:
    """Bring float64 parts to the host's device and dtype: the one rounding of a merge."""
    if layer is None and base_is_sequential(job.target):
        raise MergeError(
            "it is a Sequential whose last step cannot take the chain (it is adapted itself, shared, or TorchScript): put the "
            "adapter on that step's output"
        )
    device, dtype = hosting.device_and_dtype([job.adapters[0]])
    parts = [part.to(device=device, dtype=dtype) for part in ([layer] if layer is not None else []) + chains]  # type: ignore[operator]
    if not all(torch.isfinite(p).all() for part in parts for p in part.parameters()):
        raise MergeError(f"its merged weights overflow {dtype}")
    return layer, chains


def base_is_sequential(module: nn.Module) -> bool:
    """Whether a module runs its children in turn, so that an extra child would become a step."""
    return isinstance(module, (nn.Sequential, nn.ModuleDict))


def _drop_adapters(root: nn.Module, state: ModelState, kept: set[str]) -> None:
    """Take all adapters out but those on ``kept`` layers; what the active ones unfroze becomes the base's own."""
    for name, record in state.adapters.items():
        for key in record.layers:
            if name not in state.active or key not in kept:
                slots = hosting.slots_of(module_at(root, key))
                assert slots is not None
                slots._modules.pop(name, None)
                slots.outputs.pop(name, None)
                slots.active = tuple(active for active in slots.active if active != name)
    for key in state.swapped:
        hosting.settle(module_at(root, key))
    if not kept:
        for key in state.swapped:
            hosting.restore(module_at(root, key))
        del root.__dict__[ATTRIBUTE]
        _restore_requires_grad(root, state)
        return
    for name in list(state.adapters):
        record = state.adapters[name]
        record.owned.clear()
        record.layers = {key: layer for key, layer in record.layers.items() if key in kept}
        if name not in state.active or not record.layers:
            del state.adapters[name]
    state.active = tuple(name for name in state.active if name in state.adapters)
    for key in [key for key in state.swapped if _is_bare(root, state, key)]:
        hosting.restore(module_at(root, key))
        state.swapped.remove(key)


def _is_bare(root: nn.Module, state: ModelState, name: str) -> bool:
    """Whether a swapped module has nothing left to be swapped for: no adapter, no norm to hold, no ``fuse`` to refuse."""
    slots = slots_at(root, name)
    base = hosting.base_class(module_at(root, name))
    fuses = any(callable(getattr(base, method, None)) for method in hosting.FUSING_METHODS)
    return slots.is_idle() and name not in state.norms and not fuses


def _restore_requires_grad(root: nn.Module, state: ModelState) -> None:
    for key, parameter in root.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(state.requires_grad.get(key, False))


def _put(part: _Part) -> None:
    """Write the merged parts onto the target, in place."""
    target: Any = part.job.target
    if part.layer is None:
        hang(target, part.chains, beside=part.merged.beside, entry=part.job.entry)
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


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
