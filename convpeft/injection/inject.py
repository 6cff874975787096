"""Put adapters into a model, and take them out: plan first, then touch."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..hosts.buffers import drop, forget, put_away
from ..hosts.kept import users_modules
from ..hosts.model import ATTRIBUTE, AdaptedModel, unwrapped
from ..hosts.modules import base_modules
from ..hosts.records import AdapterRecord
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.spec import SpecLike, as_spec
from .install import build, check_name, install
from .switching import switch, train_only


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
        StateError: if the name is taken or unusable.
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
    if len(names) == len(state.adapters):
        adapted.check_restorable()
    switch(adapted, tuple(active for active in state.active if active not in names))
    for each in names:
        adapted.take_out(each, adapted.touched([each]))
        drop(adapted.root, each)
        del state.adapters[each]
    if state.adapters:
        train_only(adapted, state.active)
        return model
    put_away(adapted.root, state.phase, held=True)
    forget(users_modules(adapted.root))
    adapted.restore(list(state.swapped))
    del adapted.root.__dict__[ATTRIBUTE]
    parameters = dict(adapted.root.named_parameters(remove_duplicate=False))
    for key, flag in state.requires_grad.items():
        if key in parameters:
            parameters[key].requires_grad_(flag)
    return model
