"""Check by running the model which adapters ran, which layers others read past, and which adapters no gradient reaches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import StateError, shortened
from ..hosts.keeping import is_frozen
from ..hosts.model import AdaptedModel
from ..hosts.reaching import cut_off
from ..hosts.watching import watched_run
from ..hosts.wrappers import inside


@dataclass(frozen=True)
class CheckReport:
    """Which adapters ran in a forward pass, and whether gradients would reach them; print it.

    Attributes:
        called: ``layer: adapter name`` of each that ran.
        never_called: of each that did not.
        read_past: of each, called or not, whose layer's weights were read while the layer was not running: what was made
            of them has nothing of the adapter, and a merge would change it.
        no_gradient: of each that ran, but that no gradient of the model's outputs would reach.
        reasons: why, for each that is not as it should be.
        frozen: of each that is to train, and whose parameters on that layer were all frozen by somebody else.
    """

    called: tuple[str, ...]
    never_called: tuple[str, ...]
    read_past: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    no_gradient: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether every active adapter ran, no layer was read past, and what is to train can."""
        return not (self.never_called or self.read_past or self.no_gradient or self.frozen)

    def __str__(self) -> str:
        count = len(self.called) + len(self.never_called)
        if self.ok:
            return f"all {count} active adapters were called"
        also = [label for label in self.read_past if label in self.called]
        lines: list[str] = []
        for labels, what in (
            (self.never_called, "were never called"),
            (also, "ran, but not in all that their layers do"),
            (self.no_gradient, "ran, but no gradient reaches them"),
        ):
            if labels:
                lines.append(f"{len(labels)} of {count} active adapters {what}:")
                lines += [f"  {label} ({self.reasons[label]})" for label in labels]
        if self.read_past:
            lines.append("Where others read a layer's weight, put the adapter on their output instead (place: output).")
        if set(self.never_called) - set(self.read_past):
            lines.append("A layer that did not run may need other inputs, or belongs to a branch that nothing uses.")
        if self.no_gradient:
            lines.append(
                "What no gradient reaches does not train. A model that needs targets for that wants them as inputs here."
            )
        if self.frozen:
            lines.append(f"{len(self.frozen)} should train and were frozen: {shortened(self.frozen)}.")
            lines.append("convpeft.set_active(model, name) lets an adapter train again.")
        return "\n".join(lines)


def check(model: nn.Module, *inputs: Any, **kwargs: Any) -> CheckReport:
    """Run the model and name every active adapter that was never called, whose layer was bypassed, or that cannot train.

    One pass runs in eval mode without gradients, and each module's mode is as before afterwards. Every operation is
    looked at: one that takes a weight of an adapted layer while that layer is not running bypasses the adapter, whether
    it is ``F.linear(x, layer.weight)``, a fused kernel or a view of the weight.

    A second pass, of a copy and with gradients, shows which adapters no gradient reaches: those under ``torch.no_grad()``
    inside the model, in a reentrant checkpoint none of whose inputs requires gradients, or before a ``detach()``. It runs in
    training mode if the copy runs so on these inputs. Nothing is said where that does not show: a copy that fails, or
    outputs in eval mode that carry no graph.

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
    plain = inside(model)
    found = watched_run(plain, [layer for _, layer, _ in watched], lambda: plain(*inputs, **kwargs))
    called: list[str] = []
    never_called: list[str] = []
    read_past: list[str] = []
    reasons: dict[str, str] = {}
    cut = cut_off(
        plain, [(layer, adapter) for _, layer, adapter in watched if id(adapter) in found.ran], inputs, kwargs
    )
    no_gradient = tuple(
        label for label, layer, adapter in watched if id(adapter) in cut and id(layer) not in found.readers
    )
    for label, layer, adapter in watched:
        ran, reader = id(adapter) in found.ran, found.readers.get(id(layer))
        (called if ran else never_called).append(label)
        if reader is not None:
            read_past.append(label)
            reasons[label] = f"its weights were read by {reader}, not by the layer itself"
        elif not ran:
            reasons[label] = "it did not run on these inputs"
        elif id(adapter) in cut:
            reasons[label] = cut[id(adapter)]
    lists = (tuple(called), tuple(never_called), tuple(read_past))
    return CheckReport(*lists, reasons, no_gradient, _frozen(adapted))


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
