"""What changes in the course of a training: said once a step by the share of it that is done."""

from __future__ import annotations

from torch import nn

from ..adapters.options import fits
from ..errors import OptionError, shown
from ..hosts.journal import Journal
from ..hosts.model import AdaptedModel
from ..hosts.transaction import change
from .switching import Switch, switch


def set_progress(model: nn.Module, done: float) -> None:
    """Say how much of a training is done, in place: the active adapters do what their specs want at that point.

    With ``norm: adapt`` and ``hold: 0.2`` in a spec, norms keep their statistics in the last fifth of the steps, in eval
    mode as with ``affine``: the rest of the adapter is then fitted to what evaluation and a merge will use. Call it before
    each step with ``step / steps``. The same share always has the same effect, so a training that is resumed, or begun
    again from 0, needs nothing else. Specs without ``hold`` want nothing.

    Args:
        model: an injected model.
        done: share of the steps, from 0 to 1.

    Raises:
        OptionError: if ``done`` is no such share.
        StateError: if nothing is injected; inside ``route``; while another thread runs the model.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).train()
        >>> _ = convpeft.inject(model, {"norm": "adapt", "hold": 0.2})
        >>> for step in range(10):
        ...     set_progress(model, step / 10)
        ...     print("adapts" if model[1].training else "holds", end=" ")
        adapts adapts adapts adapts adapts adapts adapts adapts holds holds
    """
    if not fits(done, float) or not 0 <= done <= 1:
        raise OptionError(f"done is the share of the steps that are done, from 0 to 1, not {shown(done)}")
    adapted = AdaptedModel.of(model)
    wanted = {}
    for name in adapted.state.active:
        record = adapted.record(name)
        hold = record.spec.get("hold", 0.0) if record.norm == "adapt" else 0.0
        wanted[name] = hold > 0 and done >= 1 - hold - 1e-9
    if all(adapted.record(name).holds == holds for name, holds in wanted.items()):
        return
    adapted.require_unrouted()
    planned = Switch.to(adapted, adapted.state.active)
    slots = [adapted.slots(key) for key in dict.fromkeys([*planned.touched, *adapted.state.norms])]

    def work(journal: Journal) -> None:
        for name, holds in wanted.items():
            journal.keep(adapted.record(name).__dict__)
            adapted.record(name).holds = holds
        switch(Switch.to(adapted, adapted.state.active), journal)

    change(adapted.root, adapted.state, work, slots, since=adapted.since)
