"""Check by one forward pass which adapters ran, and which layers were bypassed: another module read their weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import StateError, shortened
from ..hosts.keeping import is_frozen
from ..hosts.model import AdaptedModel
from ..hosts.watching import watched_run


@dataclass(frozen=True)
class CheckReport:
    """Which adapters ran in one forward pass; print it.

    Attributes:
        called: ``layer: adapter name`` of each that ran.
        never_called: of each that did not.
        read_past: of each, called or not, whose layer's weights were read while the layer was not running: what was made
            of them has nothing of the adapter, and a merge would change it.
        reasons: why, for each that is not as it should be.
        frozen: of each that is to train, and whose parameters on that layer were all frozen by somebody else.
    """

    called: tuple[str, ...]
    never_called: tuple[str, ...]
    read_past: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether every active adapter ran, no layer was read past, and what is to train can."""
        return not self.never_called and not self.read_past and not self.frozen

    def __str__(self) -> str:
        count = len(self.called) + len(self.never_called)
        if self.ok:
            return f"all {count} active adapters were called"
        also = [label for label in self.read_past if label in self.called]
        lines: list[str] = []
        for labels, what in (
            (self.never_called, "were never called"),
            (also, "ran, but not in all that their layers do"),
        ):
            if labels:
                lines.append(f"{len(labels)} of {count} active adapters {what}:")
                lines += [f"  {label} ({self.reasons[label]})" for label in labels]
        if self.read_past:
            lines.append("Where others read a layer's weight, put the adapter on their output instead (place: output).")
        if set(self.never_called) - set(self.read_past):
            lines.append("A layer that did not run may need other inputs, or belongs to a branch that nothing uses.")
        if self.frozen:
            lines.append(f"{len(self.frozen)} should train and were frozen: {shortened(self.frozen)}.")
            lines.append("convpeft.set_active(model, name) lets an adapter train again.")
        return "\n".join(lines)


def check(model: nn.Module, *inputs: Any, **kwargs: Any) -> CheckReport:
    """Run one forward pass and name every active adapter that was never called, or whose layer was bypassed.

    The pass runs in eval mode without gradients, and each module's mode is as before afterwards. Every operation is
    looked at: one that takes a weight of an adapted layer while that layer is not running bypasses the adapter, whether
    it is ``F.linear(x, layer.weight)``, a fused kernel or a view of the weight.

    Args:
        model: an injected model.
        inputs, kwargs: what the model is called with.

    Raises:
        StateError: if nothing is injected, no adapter is active, or an adapted layer was replaced since.
    """
    adapted = AdaptedModel.of(model)
    adapted.require_hosts()
    if not adapted.state.active:
        raise StateError("no adapter is active, so none could be called: convpeft.set_active(model, name) first")
    watched = [
        (f"{key or '(root)'}: {name}", adapted.module(key), adapter)
        for name in adapted.state.active
        for key, adapter in adapted.adapters(name)
    ]
    plain = getattr(model, "_orig_mod", model)  # of torch.compile
    found = watched_run(plain, [layer for _, layer, _ in watched], lambda: plain(*inputs, **kwargs))
    called: list[str] = []
    never_called: list[str] = []
    read_past: list[str] = []
    reasons: dict[str, str] = {}
    for label, layer, adapter in watched:
        ran, reader = id(adapter) in found.ran, found.readers.get(id(layer))
        (called if ran else never_called).append(label)
        if reader is not None:
            read_past.append(label)
            reasons[label] = f"its weights were read by {reader}, not by the layer itself"
        elif not ran:
            reasons[label] = "it did not run on these inputs"
    return CheckReport(tuple(called), tuple(never_called), tuple(read_past), reasons, _frozen(adapted))


def _frozen(adapted: AdaptedModel) -> tuple[str, ...]:
    """Return, as ``layer: adapter name``, what should train in a pass in training mode and was frozen."""
    state = adapted.state
    names = () if state.resting else [name for name in state.active if name in state.trained]
    return tuple(
        f"{key or '(root)'}: {name}"
        for name in names
        for key, module in adapted.touched([name]).items()
        if is_frozen(module, adapted.slots(key), name)
    )
