"""Put adapters into a model, and take them out: plan first, then touch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..convolution.precision import floating_dtype
from ..hosts.buffers import drop, forget, note_buffers, put_away
from ..hosts.journal import Journal, named_parameters
from ..hosts.kept import users_modules
from ..hosts.model import ATTRIBUTE, AdaptedModel, whole
from ..hosts.modules import base_modules
from ..hosts.records import AdapterRecord
from ..hosts.trained import train_only
from ..hosts.trainers import guard_trainers
from ..hosts.transaction import change, with_normal_tensors
from ..hosts.transactions import protect
from ..hosts.wrappers import refuse_parallel
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.spec import SpecLike, as_spec
from .install import build, check_name, install
from .switching import Switch, switch


@with_normal_tensors
def inject(
    model: nn.Module,
    spec: SpecLike,
    *,
    name: str = "default",
    example_inputs: Any = None,
    lean: bool = True,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
) -> Plan:
    """Put the adapters a spec asks for into the model in place, freeze the rest, and return the plan as a report.

    The new adapter is the active one afterwards. It starts as the identity: no output changes. Adapters already in the
    model stay, inactive. Everything that can fail is done before the first change.

    Args:
        model: any module; it stays the same object, and so does every layer in it.
        spec: a ``Spec``, plain data, or the path of a spec file.
        name: under which the adapter is switched, saved and ejected.
        example_inputs: see ``plan``.
        lean: let frozen convolutions and norms save for backward only what their input's gradient needs. The values and
            gradients are the same; the last call to ``inject`` or ``load_adapter`` decides for the whole model.
        dtype: of the adapters' parameters, as a dtype or its name; unset, that of their layers. ``"float32"`` is for a
            base in half precision: the optimizer's steps are then not rounded away. The outputs keep their dtype.
        batch_size: see ``plan``; what it warns of is given as a ``UserWarning`` as well.

    Raises:
        SpecError: all problems of the spec at once; or a dtype that adapters cannot have.
        StateError: if the name is taken or unusable, or the model is a part of one that has adapters, or has such a part;
            while another thread runs the model.
        HostError: if a module does not allow its class to be extended, or DDP or FSDP wraps the model already.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> report = inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}, name="screw")
        >>> [n for n, p in model.named_parameters() if p.requires_grad]
        ['0.convpeft.screw.down', '0.convpeft.screw.up']
    """
    root, wanted = whole(model), floating_dtype(dtype)
    check_name(root, name)
    refuse_parallel(root)
    guard_trainers(map(type, root.modules()))
    report = make_plan(root, as_spec(spec), example_inputs, batch_size)
    layers = {layer.name: layer.record() for layer in report.layers}
    record = AdapterRecord(report.spec, layers, dict(report.owned), report.norm)
    built = build(dict(base_modules(root)), report.layers, report.owned, dtype=wanted)
    install(root, name, record, built, lean=lean)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=3)  # the caller, behind with_normal_tensors
    return report


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take out one adapter, or all of them (``name=None``), in place, and return the model.

    With the last one everything is as it was before the first ``inject``, bit for bit: classes, tensors, the order of
    the state_dict's keys, and each parameter's ``requires_grad``. A model without adapters is returned as it is.

    Raises:
        UnknownAdapter: if no adapter has that name.
        StateError: inside ``route``; while another thread runs the model, or has a ``with`` block of convpeft open.
    """
    adapted = AdaptedModel.find(model)
    if adapted is None:
        if name is not None:
            AdaptedModel.of(model)
        return model
    state = adapted.state
    names = list(state.adapters) if name is None else [name]
    for each in names:
        adapted.record(each)
    adapted.require_unrouted()
    is_last = len(names) == len(state.adapters)
    if is_last:
        adapted.check_restorable()
    planned = Switch.to(adapted, tuple(active for active in state.active if active not in names))

    def work(journal: Journal) -> None:
        journal.keep(state.__dict__, state.adapters, state.swapped)
        for key in state.swapped if is_last else adapted.touched(names):
            journal.keep_module(adapted.module(key))
        note_buffers(adapted.root, state.phase, journal)
        switch(planned, journal)
        for each in names:
            adapted.take_out(each, adapted.touched([each]))
            drop(adapted.root, each)
            del state.adapters[each]
        if is_last:
            _give_back(adapted, journal)
        else:
            train_only(adapted, state.active, journal)
        protect(adapted.root, journal)

    change(adapted.root, state, work, [adapted.slots(key) for key in state.swapped], since=adapted.since)
    return model


def _give_back(adapted: AdaptedModel, journal: Journal) -> None:
    """Give all modules their classes and buffers back, and all parameters their ``requires_grad``, in place."""
    state = adapted.state
    put_away(adapted.root, state.phase, held=True)
    forget(users_modules(adapted.root))
    adapted.restore(list(state.swapped))
    del adapted.root.__dict__[ATTRIBUTE]
    for key, parameter in named_parameters(adapted.root):
        if key in state.requires_grad:
            journal.require_grad(parameter, state.requires_grad[key])
