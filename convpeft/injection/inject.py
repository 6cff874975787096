"""Put adapters into a model, and take them out: plan first, then touch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..hosts.journal import Journal, named_parameters
from ..hosts.model import ATTRIBUTE, AdaptedModel, unwrapped
from ..hosts.modules import base_modules
from ..hosts.records import AdapterRecord
from ..hosts.trained import train_only
from ..hosts.transaction import change, with_normal_tensors
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.spec import SpecLike, as_spec
from .install import build, check_name, install
from .switching import Switch, switch


@with_normal_tensors
def inject(
    model: nn.Module, spec: SpecLike, *, name: str = "default", example_inputs: Any = None, lean: bool = True
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

    Raises:
        SpecError: all problems of the spec at once.
        StateError: if the name is taken or unusable; while another thread runs the model.
        HostError: if a module does not allow its class to be extended.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> report = inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}, name="screw")
        >>> [n for n, p in model.named_parameters() if p.requires_grad]
        ['0.convpeft.screw.down', '0.convpeft.screw.up']
    """
    root = unwrapped(model)
    check_name(root, name)
    report = make_plan(root, as_spec(spec), example_inputs)
    layers = {layer.name: layer.record() for layer in report.layers}
    record = AdapterRecord(report.spec, layers, dict(report.owned), report.norm)
    install(root, name, record, build(dict(base_modules(root)), report.layers, report.owned), lean=lean)
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
        switch(planned, journal)
        for each in names:
            adapted.take_out(each, adapted.touched([each]))
            del state.adapters[each]
        if is_last:
            _give_back(adapted, journal)
        else:
            train_only(adapted, state.active, journal)

    change(adapted.root, state, work, [adapted.slots(key) for key in state.swapped], since=adapted.since)
    return model


def _give_back(adapted: AdaptedModel, journal: Journal) -> None:
    """Give all modules their classes back, and all parameters their ``requires_grad``, in place."""
    state = adapted.state
    adapted.restore(list(state.swapped))
    del adapted.root.__dict__[ATTRIBUTE]
    for key, parameter in named_parameters(adapted.root):
        if key in state.requires_grad:
            journal.require_grad(parameter, state.requires_grad[key])
