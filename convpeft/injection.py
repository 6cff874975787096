"""Put adapters in, switch between them, take them out: plan first, then touch, all or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hosting
from .adapters.base import Adapter
from .errors import AdapterConflict, SpecError, StateError
from .exchanging import check_classes, check_exchange
from .planning import Plan, can_be_lean, check_host, make_plan
from .registry import adapter_class
from .spec import Spec, read_spec
from .state import (
    ATTRIBUTE,
    AdapterRecord,
    ModelState,
    adapter_at,
    find_state,
    module_at,
    record_of,
    require_hosts,
    require_state,
    slots_at,
    unwrapped,
)

SpecLike = Spec | Mapping[str, Any] | str | Path
_FORBIDDEN = set("./\\") | set(" \t\n")


def as_spec(spec: SpecLike) -> Spec:
    """Return a ``Spec`` from a spec, plain data, or the path of a spec file; planning checks its rules."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, Mapping):
        return Spec.draft(spec)
    if isinstance(spec, (str, Path)):
        return Spec.draft(read_spec(spec))
    raise SpecError(f"a spec is a Spec, a mapping or a path, not {type(spec).__name__}")


def plan(model: nn.Module, spec: SpecLike, *, example_inputs: Any = None) -> Plan:
    """Return what ``inject`` would do, printable; the model is not touched.

    Args:
        model: any module.
        spec: a ``Spec``, plain data, or the path of a spec file.
        example_inputs: inputs to run a copy of the model on where only that tells the channels of a block's output.

    Raises:
        SpecError: all problems of the spec at once (a subclass when all are of one sort).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> plan(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}).adapter_parameters
        70
    """
    return make_plan(unwrapped(model), as_spec(spec), example_inputs)


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
        lean: let frozen convolutions and norms keep for backward only what their input's gradient needs. The values and
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
    _check_name(root, name)
    report = make_plan(root, as_spec(spec), example_inputs)
    layers = {layer.name: layer.record() for layer in report.layers}
    record = AdapterRecord(report.spec, layers, dict(report.owned), report.norm)
    install(root, name, record, build(root, report), lean=lean)
    return report


@dataclass
class Built:
    """Everything an adapter needs, made before the model is touched."""

    adapters: dict[str, Adapter]
    drawers: dict[str, hosting.Tensors]


def build(root: nn.Module, report: Plan) -> Built:
    """Return the adapters and copied tensors of a plan, on the device and in the dtype of their hosts."""
    adapters: dict[str, Adapter] = {}
    for layer in report.layers:
        device, dtype = hosting.device_and_dtype([module_at(root, layer.name), root])
        with torch.device(device):
            adapter = adapter_class(layer.kind)(layer.site, layer.options)
        adapters[layer.name] = adapter.to(dtype=dtype).train(hosting.wants_training(module_at(root, layer.name)))
    return Built(adapters, copied_base(root, report.owned))


def copied_base(root: nn.Module, names: Iterable[str]) -> dict[str, hosting.Tensors]:
    """Return copies of the base's own tensors of modules by name, whichever adapter is shown at the moment.

    A tensor that two of the modules share is one tensor among the copies too.
    """
    copies: dict[int, torch.Tensor] = {}
    drawers: dict[str, hosting.Tensors] = {}
    for name in names:
        drawers[name] = drawer = hosting.Tensors()
        for key, tensor in hosting.shown_tensors(module_at(root, name), hosting.BASE).items():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    copied = copies[id(tensor)]
                    copies[id(tensor)] = nn.Parameter(copied, requires_grad=copied.is_floating_point())
            store = drawer._parameters if isinstance(tensor, nn.Parameter) else drawer._buffers
            store[key] = copies[id(tensor)]  # type: ignore[assignment]
    return drawers


def install(root: nn.Module, name: str, record: AdapterRecord, built: Built, *, lean: bool) -> None:
    """Put built parts into the model under ``name`` and make it the active adapter, in place, or change nothing."""
    state = find_state(root)
    if state is not None:
        switchable(state)
    modules = _unique(root)
    before = _Before(root, state, modules)
    if state is None:
        if before.lean:
            raise StateError(
                f"this {hosting.base_class(root).__name__} is part of a model that has adapters already, or a copy of such "
                "a part. Inject into that model, with patterns for this part, or eject its adapters first."
            )
        state = ModelState(
            requires_grad={key: p.requires_grad for key, p in root.named_parameters(remove_duplicate=False)}
        )
        state.norms = [key for key, module in modules if hosting.is_batchnorm_like(module)]
    wanted = _swapped_by(modules, state, record, lean)
    for key in wanted:
        check_host(module_at(root, key), key)
    require_hosts(root, state)
    try:
        for key in wanted:
            hosting.adapt(module_at(root, key))
            if key not in state.swapped:
                state.swapped.append(key)
        for key, adapter in built.adapters.items():
            slots = slots_at(root, key)
            slots[name] = adapter
            slots.outputs[name] = record.layers[key].output
        for key, drawer in built.drawers.items():
            hosting.add_owner(module_at(root, key), name, drawer)
        for key in state.swapped:
            slots_at(root, key).lean = lean
        state.adapters[name] = record
        root.__dict__[ATTRIBUTE] = state
        for parameter in root.parameters():
            parameter.requires_grad_(False)
        _switch(root, state, (name,))
        _train_only_active(root, state)
    except BaseException:
        before.return_to(root, name)
        raise


def _swapped_by(
    modules: list[tuple[str, nn.Module]], state: ModelState, record: AdapterRecord, lean: bool
) -> list[str]:
    """Return every module whose class must be swapped: hosts, owners, norms, and parents that could fuse hosts away.

    ``lean`` adds the frozen layers that can keep less.
    """
    hosts = [*record.layers, *record.owned]
    wanted = dict.fromkeys([*hosts, *state.norms])
    if lean:
        wanted.update({key: None for key, module in modules if can_be_lean(module)})
    for key, module in modules:
        fuses = any(callable(getattr(hosting.base_class(module), method, None)) for method in hosting.FUSING_METHODS)
        if fuses and any(not key or host == key or host.startswith(key + ".") for host in record.layers):
            wanted[key] = None
    return list(wanted)


class _Before:
    """What an interrupted install has to give back."""

    def __init__(self, root: nn.Module, state: ModelState | None, modules: list[tuple[str, nn.Module]]) -> None:
        self.fresh = state is None
        self.active = () if state is None else state.active
        self.trained = () if state is None else state.trained
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        slots = {id(module): hosting.slots_of(module) for _, module in modules}
        self.lean = {key: each.lean for key, each in slots.items() if each is not None}

    def return_to(self, root: nn.Module, name: str) -> None:
        state = find_state(root)
        if state is not None and not self.fresh:
            state.held = None  # whatever was held or let go in between
            _switch(root, state, self.active)
        for key, module in _unique(root):
            slots = hosting.slots_of(module)
            if slots is None:
                continue
            _take_out(module, name)
            if id(module) in self.lean:
                slots.lean = self.lean[id(module)]
            else:
                hosting.restore(module)
                if state is not None and key in state.swapped:
                    state.swapped.remove(key)
        if state is not None:
            state.adapters.pop(name, None)
            state.trained = self.trained
            if self.fresh:
                root.__dict__.pop(ATTRIBUTE, None)
        for parameter, flag in self.requires_grad:
            parameter.requires_grad_(flag)


def eject(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take out one adapter, or all of them (``name=None``), in place, and return the model.

    With the last one everything is as it was before the first ``inject``, bit for bit: classes, tensors, the order of
    the state_dict's keys, and each parameter's ``requires_grad``. A model without adapters is returned as it is.

    Raises:
        UnknownAdapter: if no adapter has that name.
    """
    root = unwrapped(model)
    state = find_state(root)
    if state is None:
        if name is not None:
            require_state(root)
        return model
    names = list(state.adapters) if name is None else [name]
    for each in names:
        record_of(state, each)
    switchable(state)
    if len(names) == len(state.adapters):
        require_hosts(root, state)
        check_classes(root, state.swapped)
    _switch(root, state, tuple(active for active in state.active if active not in names))
    for each in names:
        record = state.adapters.pop(each)
        for key in dict.fromkeys([*record.layers, *record.owned]):
            _take_out(module_at(root, key), each)
    if state.adapters:
        _train_only_active(root, state)
        return model
    for key in state.swapped:
        hosting.restore(module_at(root, key))
    del root.__dict__[ATTRIBUTE]
    parameters = dict(root.named_parameters(remove_duplicate=False))
    for key, flag in state.requires_grad.items():
        if key in parameters:
            parameters[key].requires_grad_(flag)
    return model


def _take_out(module: nn.Module, name: str) -> None:
    slots = hosting.slots_of(module)
    if slots is None:
        return
    slots._modules.pop(name, None)
    slots.outputs.pop(name, None)
    slots.active = tuple(active for active in slots.active if active != name)
    if name in slots.owners:
        hosting.remove_owner(module, name)


def set_active(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Choose the adapters that take part from now on, in place: one, several (their sum), or None (the bare base).

    Only bookkeeping and exchange by reference: nothing is copied. The active adapters are the ones that train.

    Raises:
        UnknownAdapter: if a name is not in the model.
        AdapterConflict: if two of them bring their own values of the same tensors.
        StateError: inside ``route``.
    """
    root, state = require_state(model)
    switchable(state)
    _switch(root, state, names_of(state, names))
    _train_only_active(root, state)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters, in order; empty for the bare base or a model without adapters."""
    state = find_state(model)
    return () if state is None else state.active


@contextmanager
def using(model: nn.Module, names: str | Iterable[str] | None) -> Iterator[nn.Module]:
    """Switch to other adapters inside a ``with`` block, and back at its end.

    Raises:
        UnknownAdapter, AdapterConflict: as ``set_active`` does.
    """
    root, state = require_state(model)
    switchable(state)
    before, trained = state.active, state.trained
    _switch(root, state, names_of(state, names))
    try:
        yield model
    finally:
        if find_state(root) is state:  # else all was ejected inside
            _switch(root, state, tuple(name for name in before if name in state.adapters))
            if state.trained != trained:  # somebody switched inside for good, as they thought
                train_only(root, state, trained)


def disabled(model: nn.Module) -> Any:
    """Run the bare base inside a ``with`` block: ``using(model, None)``."""
    return using(model, None)


def switchable(state: ModelState) -> None:
    """Raise a StateError inside ``route``, where samples have adapters of their own."""
    if state.routed is not None:
        raise StateError("the model is inside convpeft.route(...): leave that block before you change its adapters")


def names_of(state: ModelState, names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the names of adapters that are to be active together, checked: known, each once, no tensor theirs twice."""
    wanted: tuple[Any, ...] = () if names is None else tuple(names) if _are_several(names) else (names,)
    for name in wanted:
        if not isinstance(name, str):
            raise StateError(f"names of adapters are texts, not {name!r}")
        record_of(state, name)
    if len(set(wanted)) < len(wanted):
        raise StateError(f"an adapter is named twice in {list(wanted)}")
    owner: dict[str, str] = {}
    for name in wanted:
        for key in state.adapters[name].owned:
            if key in owner:
                raise AdapterConflict(
                    f"{owner[key]!r} and {name!r} both bring their own weights of {key!r}; they can be active one at a "
                    "time, not together. Train them with adapters only (no unfreeze there) to add them up."
                )
            owner[key] = name
    return wanted


def _are_several(names: Any) -> bool:
    return isinstance(names, Iterable) and not isinstance(names, str)


def _switch(root: nn.Module, state: ModelState, names: tuple[str, ...]) -> None:
    """Make ``names`` the active adapters: which run, whose tensors are shown, which norms are held."""
    owner = {key: name for name in names for key in state.adapters[name].owned}
    held = not any(state.adapters[name].norm == "adapt" for name in names)
    records = [state.adapters[name] for name in dict.fromkeys([*state.active, *names])]
    touched = dict.fromkeys(key for record in records for key in (*record.layers, *record.owned))
    norms = state.norms if held != state.held else ()
    require_hosts(root, state)
    slots = {key: slots_at(root, key) for key in touched}
    check_exchange(root, {key: owner.get(key) for key in touched})
    for key in touched:
        slots[key].active = tuple(name for name in names if name in slots[key]._modules)
        hosting.show(module_at(root, key), owner.get(key))
    for key in norms:
        hosting.hold(module_at(root, key), held)
    state.active, state.held = names, held
    _forget_compiled()


def _forget_compiled() -> None:
    """Have ``torch.compile`` look again where it does not watch the attributes of modules (older torch)."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not getattr(dynamo.config, "guard_nn_modules", True):
        dynamo.reset()


def _train_only_active(root: nn.Module, state: ModelState) -> None:
    """Let exactly the active adapters' parameters, and their own values of unfrozen tensors, require gradients."""
    train_only(root, state, state.active)


def train_only(root: nn.Module, state: ModelState, names: tuple[str, ...]) -> None:
    """Let exactly the named adapters require gradients, in place; what neither was nor is to be trained is not looked at."""
    changed = dict.fromkeys(name for name in (*state.trained, *names) if name in state.adapters)
    state.trained = tuple(name for name in names if name in state.adapters)
    for name in changed:
        record, flag = state.adapters[name], name in names
        for key in record.layers:
            adapter_at(root, key, name).requires_grad_(flag)
        for key in record.owned:
            for tensor in hosting.shown_tensors(module_at(root, key), name).values():
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    tensor.requires_grad_(flag)


def _unique(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the user's modules, each once, under its first name."""
    seen: dict[int, tuple[str, nn.Module]] = {}
    for name, module in hosting.base_modules(root):
        seen.setdefault(id(module), (name, module))
    return list(seen.values())


def _check_name(root: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or name.startswith("_") or set(name) & _FORBIDDEN:
        raise StateError(
            f"{name!r} is no adapter name: use a text without dots, slashes or blanks that does not begin with '_'"
        )
    state = find_state(root)
    if state is not None and name in state.adapters:
        raise StateError(
            f"an adapter {name!r} is already in the model. Take another name, or convpeft.eject(model, {name!r}) first."
        )
