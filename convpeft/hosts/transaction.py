"""Change a model whole or not at all, whatever is raised on the way, an interrupt at any line included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import StateError
from .journal import Journal
from .records import ATTRIBUTE, ModelState
from .slots import Slots, base_class
from .threads import Gate, require_alone, thread_of

Function = TypeVar("Function", bound=Callable[..., Any])
_CHANGING = "is changing this model's adapters"
_TRIES = 8  # to finish what has to be finished, when one interrupt follows another


def change(
    root: nn.Module,
    state: ModelState,
    work: Callable[[Journal], Any],
    slots: Iterable[Slots] = (),
    *,
    since: int | None = None,
) -> None:
    """Let ``work`` change a model in place; if anything is raised, everything is as it was before.

    Meanwhile a pass that another thread begins is refused. A change that could not be undone, because one interrupt
    followed another, is noted in the state, and the next call of any function of convpeft undoes it.

    Args:
        root: of the model.
        state: its records.
        work: notes in the journal whatever it is about to change, and calls nothing that a user wrote. The attributes of
            ``slots`` are noted already.
        slots: of the layers that are changed; of blocks that are entered or left, those of the block.
        since: the number of changes when this one was planned: refuse if another came since, or if another thread runs the
            model. None: a block is left, in which no other thread could do either.

    Raises:
        StateError: then; the model is as it was.
    """
    if since is not None:
        require_alone(root)
    journal, gate, closed = Journal(), Gate(_CHANGING), list(slots)
    try:
        try:
            _claim(root, state, journal, since)
            own = _close(root, state, gate, closed, journal)
            if since is not None:
                require_alone(root)  # a pass that began before the gate was closed
            work(journal)
            _open(root, state, own, closed)
            state.changes += 1
            state.__dict__.pop("journal", None)
        except BaseException:
            surely(partial(_undo, state, journal))
            raise
    except BaseException:
        surely(partial(_undo, state, journal))
        raise


def _claim(root: nn.Module, state: ModelState, journal: Journal, since: int | None) -> None:
    """Note a change as the one that is being made, in place; of several threads only one gets here.

    Raises:
        StateError: if another thread is changing the model, or has changed it since this change was planned.
    """
    first = state.__dict__.setdefault("journal", journal) is journal  # one step: no thread comes between
    attached = root.__dict__.get(ATTRIBUTE)
    if not first or since not in (None, state.changes) or (attached is not None and attached is not state):
        if first:
            state.__dict__.pop("journal", None)
        raise StateError(
            f"another thread is changing the adapters of this {base_class(root).__name__}, or has just done so: call again; "
            "this call changed nothing."
        )


def _close(root: nn.Module, state: ModelState, gate: Gate, slots: list[Slots], journal: Journal) -> Any:
    """Let no other thread begin a pass, in place; return the forward that the root has of its own, or None."""
    journal.keep(root.__dict__, *[each.__dict__ for each in slots])
    own = root.__dict__.get("forward")  # accelerate's hooks, say
    root.__dict__[ATTRIBUTE] = state
    root.__dict__["forward"] = partial(_refuse, root, gate)
    for each in slots:
        each.__dict__["router"] = gate
    return own


def _open(root: nn.Module, state: ModelState, own: Any, slots: list[Slots]) -> None:
    """Let passes begin again, in place; the innermost block that a layer is in stands before it."""
    for each in slots:
        each.__dict__["router"] = None
    for block in state.blocks:
        for each in block.slots:
            each.__dict__["router"] = block
    if own is None:
        root.__dict__.pop("forward", None)
    else:
        root.__dict__["forward"] = own


def _refuse(root: nn.Module, gate: Gate, *args: Any, **kwargs: Any) -> Any:
    raise gate.refusal(root)


def _undo(state: ModelState, journal: Journal) -> None:
    if state.journal is journal:
        journal.undo()
        state.__dict__.pop("journal", None)


def surely(step: Callable[[], None]) -> None:
    """Do what may be done twice until it is done; interrupts that come meanwhile are raised at the end."""
    interrupt = None
    for _ in range(_TRIES):
        try:
            step()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def settle(root: nn.Module, state: ModelState) -> None:
    """Undo a change that interrupts left half done, in place.

    Raises:
        StateError: if the change is under way in another thread.
    """
    journal = state.journal
    thread = thread_of(change.__code__, "journal", journal)
    if thread is None:
        surely(partial(_undo, state, journal))
    elif Gate(_CHANGING, thread).is_elsewhere:
        raise Gate(_CHANGING, thread).refusal(root)


def with_normal_tensors(function: Function) -> Function:
    """Return the function so that it makes normal tensors, which can train, inside ``torch.inference_mode``, too."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
