"""Switch between the adapters in a model: which run, whose tensors are shown, which norms are held, and what trains."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import AdapterConflict, StateError
from ..hosts.buffers import bring_out, note_buffers, put_away, weights_stamp
from ..hosts.journal import Journal
from ..hosts.model import AdaptedModel
from ..hosts.records import ModelState, Names
from ..hosts.slots import Slots
from ..hosts.steps import watch_steps
from ..hosts.swap import hold
from ..hosts.threads import Block
from ..hosts.trained import train_only
from ..hosts.transaction import change
from ..hosts.unfrozen import check_exchange, swap_in


def set_active(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Choose the adapters that take part from now on, in place: one, several (their sum), or None (the bare base).

    Tensors are exchanged by reference: nothing is copied. The active adapters are the ones that train. If anything is
    raised, an interrupt included, the model is as it was.

    Raises:
        UnknownAdapter: if a name is not in the model.
        AdapterConflict: if two of them bring their own values of the same tensors.
        StateError: inside ``route``; while another thread runs the model, or has a ``with`` block of convpeft open.
    """
    adapted = AdaptedModel.of(model)
    adapted.require_unrouted()
    wanted = names_of(adapted, names)
    planned = Switch.to(adapted, wanted)

    def work(journal: Journal) -> None:
        switch(planned, journal)
        train_only(adapted, wanted, journal)

    change(adapted.root, adapted.state, work, planned.slots, since=adapted.since)
    watch_steps(adapted.root)
    _forget_compiled()


def active_adapters(model: nn.Module) -> Names:
    """Return the names of the active adapters, in order; empty for the bare base or a model without adapters."""
    adapted = AdaptedModel.find(model)
    return () if adapted is None else adapted.state.active


@contextmanager
def using(model: nn.Module, names: str | Iterable[str] | None) -> Iterator[nn.Module]:
    """Switch to other adapters inside a ``with`` block, and back at its end.

    The block belongs to the thread that entered it: a pass of another thread is refused meanwhile.

    Raises:
        UnknownAdapter, AdapterConflict, StateError: as ``set_active`` does.
    """
    adapted = AdaptedModel.of(model)
    adapted.require_unrouted()
    wanted = names_of(adapted, names)
    block = _Using(adapted)
    try:
        try:
            block.enter(wanted)
            yield model
        finally:
            block.leave()
    finally:  # an interrupt may have come before the line above
        block.leave()


class _Using(Block):
    """The block of ``using``: what is active in it, and what is active and trains after it."""

    rests = True

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__("is inside convpeft.using(...) or convpeft.disabled(...)", [])
        self.root, self.state, self.since = adapted.root, adapted.state, adapted.since
        self.before, self.trained = self.state.active, self.state.trained

    def enter(self, names: Names) -> None:
        """Switch, in place, and note the block in the state; both or neither."""
        adapted = AdaptedModel(self.root, self.state)
        planned = Switch.to(adapted, names)
        self.slots = planned.slots

        def work(journal: Journal) -> None:
            switch(planned, journal)
            enter_block(self.state, self, journal)

        change(self.root, self.state, work, planned.slots, since=self.since)
        _forget_compiled()

    def leave(self) -> None:
        """Switch back, in place; nothing happens if the block was not entered, or was left, or all was ejected inside."""
        adapted = AdaptedModel.find(self.root)
        if adapted is None or adapted.state is not self.state or self not in self.state.blocks:
            return
        planned = Switch.to(adapted, tuple(name for name in self.before if name in self.state.adapters))

        def work(journal: Journal) -> None:
            switch(planned, journal)
            if self.state.trained != self.trained:  # somebody switched inside for good, as they thought
                train_only(adapted, self.trained, journal)
            leave_block(self.state, self, journal)

        change(self.root, self.state, work, [*self.slots, *planned.slots])
        _forget_compiled()


def enter_block(state: ModelState, block: Block, journal: Journal) -> None:
    """Note a block as the innermost one, in place."""
    journal.keep(state.__dict__)
    state.blocks = (*state.blocks, block)


def leave_block(state: ModelState, block: Block, journal: Journal) -> None:
    """Forget a block, in place."""
    journal.keep(state.__dict__)
    state.blocks = tuple(each for each in state.blocks if each is not block)


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
    """Return whether norms stay in eval mode while these adapters are active: unless one of them adapts them now."""
    records = map(adapted.record, names)
    return not any(record.norm == "adapt" and not record.holds for record in records)


@dataclass(frozen=True)
class Switch:
    """A switch that has been checked and not been made.

    Attributes:
        adapted: the model.
        names: of the adapters to be active.
        owner: by name of a module, the adapter that is to show its own values there.
        touched: by name, every module that the old or the new adapters sit on or unfroze, with its slots.
        norms: those to be held or let go, with their slots.
    """

    adapted: AdaptedModel
    names: Names
    owner: dict[str, str]
    touched: dict[str, tuple[nn.Module, Slots]]
    norms: list[tuple[nn.Module, Slots]]

    @classmethod
    def to(cls, adapted: AdaptedModel, names: Names) -> Switch:
        """Return the switch to these adapters.

        Raises:
            StateError: if a module or a tensor that it needs is gone.
        """
        state = adapted.state
        adapted.require_hosts()
        touched = adapted.touched(dict.fromkeys([*state.active, *names]))
        owner = owners_of(adapted, names)
        check_exchange(adapted.root, {key: (module, owner.get(key)) for key, module in touched.items()})
        norms = state.norms if holds_norms(adapted, names) != state.held else []
        return cls(
            adapted,
            names,
            owner,
            {key: (module, adapted.slots(key)) for key, module in touched.items()},
            [(adapted.module(key), adapted.slots(key)) for key in norms],
        )

    @property
    def slots(self) -> list[Slots]:
        """The slots of all modules that it changes."""
        return [slots for _, slots in (*self.touched.values(), *self.norms)]


def owners_of(adapted: AdaptedModel, names: Names) -> dict[str, str]:
    """Return, by name of the module, which of the adapters brings its own values of it."""
    return {key: name for name in names for key in adapted.state.adapters[name].owned}


def switch(planned: Switch, journal: Journal) -> None:
    """Make the planned adapters the active ones, in place: which run, whose tensors are shown, which norms are held.

    The attributes of the slots have to be in the journal already.
    """
    adapted, names, state = planned.adapted, planned.names, planned.adapted.state
    held = holds_norms(adapted, names)
    journal.keep(state.__dict__, state.phase.__dict__)
    note_training(adapted)
    if state.phase.trained or state.phase.own:
        note_buffers(adapted.root, state.phase, journal)
    moved = put_away(adapted.root, state.phase)
    for key, (module, slots) in planned.touched.items():
        slots.activate(names)
        swap_in(module, planned.owner.get(key), journal)
    for module, _ in planned.norms:
        journal.keep(module.__dict__)
        hold(module, held)
    bring_out(moved, state.phase, names)
    state.active, state.held = names, held
    state.phase.stamp = weights_stamp(adapted.touched(names).values(), names)


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
