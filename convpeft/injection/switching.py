"""Switch between the adapters in a model: which run, whose tensors are shown, which norms are held, and what trains."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import AdapterConflict, StateError
from ..hosts.buffers import bring_out, put_away, weights_stamp
from ..hosts.model import AdaptedModel
from ..hosts.swap import hold
from ..hosts.unfrozen import check_exchange, swap_in

Names = tuple[str, ...]


def set_active(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Choose the adapters that take part from now on, in place: one, several (their sum), or None (the bare base).

    Tensors are exchanged by reference: nothing is copied. The active adapters are the ones that train.

    Raises:
        UnknownAdapter: if a name is not in the model.
        AdapterConflict: if two of them bring their own values of the same tensors.
        StateError: inside ``route``.
    """
    adapted = AdaptedModel.of(model)
    adapted.require_unrouted()
    switch(adapted, names_of(adapted, names))
    train_only(adapted, adapted.state.active)


def active_adapters(model: nn.Module) -> Names:
    """Return the names of the active adapters, in order; empty for the bare base or a model without adapters."""
    adapted = AdaptedModel.find(model)
    return () if adapted is None else adapted.state.active


@contextmanager
def using(model: nn.Module, names: str | Iterable[str] | None) -> Iterator[nn.Module]:
    """Switch to other adapters inside a ``with`` block, and back at its end.

    Raises:
        UnknownAdapter, AdapterConflict: as ``set_active`` does.
    """
    adapted = AdaptedModel.of(model)
    adapted.require_unrouted()
    state = adapted.state
    before, trained = state.active, state.trained
    switch(adapted, names_of(adapted, names))
    state.resting += 1
    try:
        yield model
    finally:
        state.resting -= 1
        now = AdaptedModel.find(adapted.root)
        if now is not None and now.state is state:  # else all was ejected inside
            switch(now, tuple(name for name in before if name in state.adapters))
            if state.trained != trained:  # somebody switched inside for good, as they thought
                train_only(now, trained)


def disabled(model: nn.Module) -> Any:
    """Run the bare base inside a ``with`` block: ``using(model, None)``."""
    return using(model, None)


def names_of(adapted: AdaptedModel, names: str | Iterable[str] | None) -> Names:
    """Return the names of adapters that are to be active together, checked: known, each once, no tensor theirs twice."""
    wanted: tuple[Any, ...]
    if names is None:
        wanted = ()
    else:
        wanted = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str) else (names,)
    for name in wanted:
        if not isinstance(name, str):
            raise StateError(f"names of adapters are texts, not {name!r}")
        adapted.record(name)
    if len(set(wanted)) < len(wanted):
        raise StateError(f"an adapter is named twice in {list(wanted)}")
    owner: dict[str, str] = {}
    for name in wanted:
        for key in adapted.record(name).owned:
            if key in owner:
                raise AdapterConflict(
                    f"{owner[key]!r} and {name!r} both bring their own weights of {key!r}; they can be active one at a "
                    "time, not together. Train them with adapters only (no unfreeze there) to add them up."
                )
            owner[key] = name
    return wanted


def holds_norms(adapted: AdaptedModel, names: Names) -> bool:
    """Return whether norms stay in eval mode while these adapters are active: unless one of them adapts them."""
    return not any(adapted.record(name).norm == "adapt" for name in names)


def switch(adapted: AdaptedModel, names: Names) -> None:
    """Make ``names`` the active adapters, in place: which run, whose tensors are shown, which norms are held."""
    state = adapted.state
    owner = {key: name for name in names for key in state.adapters[name].owned}
    held = holds_norms(adapted, names)
    adapted.require_hosts()
    touched = adapted.touched(dict.fromkeys([*state.active, *names]))
    check_exchange(adapted.root, {key: (module, owner.get(key)) for key, module in touched.items()})
    note_training(adapted)
    moved = put_away(adapted.root, state.phase)
    for key, module in touched.items():
        adapted.slots(key).activate(names)
        swap_in(module, owner.get(key))
    for key in state.norms if held != state.held else ():
        hold(adapted.module(key), held)
    bring_out(moved, state.phase, names)
    state.active, state.held = names, held
    state.phase.stamp = weights_stamp(adapted.touched(names).values(), names)
    _forget_compiled()


def note_training(adapted: AdaptedModel) -> None:
    """Note, in place, whether the active adapters trained since the last switch though no module was in training mode."""
    state = adapted.state
    if not state.phase.trained:
        weights, count = weights_stamp(adapted.touched(state.active).values(), state.active)
        then = state.phase.stamp
        state.phase.trained = weights == then[0] and count != then[1]


def _forget_compiled() -> None:
    """Reset compiled code where ``torch.compile`` does not guard the attributes of modules (older torch)."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not getattr(dynamo.config, "guard_nn_modules", True):
        dynamo.reset()


def train_only(adapted: AdaptedModel, names: Names) -> None:
    """Let exactly the named adapters require gradients, in place: their parameters and their unfrozen tensors.

    Adapters that neither were nor are to be trained are not looked at.
    """
    state = adapted.state
    changed = dict.fromkeys(name for name in (*state.trained, *names) if name in state.adapters)
    state.trained = tuple(name for name in names if name in state.adapters)
    for name in changed:
        for _, adapter in adapted.adapters(name):
            adapter.requires_grad_(name in names)
        for _, tensors in adapted.unfrozen(name):
            for tensor in tensors.values():
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    tensor.requires_grad_(name in names)
