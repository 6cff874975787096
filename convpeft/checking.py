"""Which adapters ran: what only one forward pass tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import StateError
from .probing import as_inputs
from .state import adapter_at, require_state


@dataclass(frozen=True)
class CheckReport:
    """Which adapters ran in one forward pass; print it.

    Attributes:
        called: ``layer: adapter name`` of each that ran.
        never_called: of each that did not.
    """

    called: tuple[str, ...]
    never_called: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every active adapter ran."""
        return not self.never_called

    def __str__(self) -> str:
        if self.ok:
            return f"all {len(self.called)} active adapters were called"
        lines = "\n".join(f"  {entry}" for entry in self.never_called)
        return (
            f"{len(self.never_called)} of {len(self.called) + len(self.never_called)} active adapters were never called:\n{lines}\n"
            "Either the layer did not run on these inputs, or its parent reads the layer's weight itself: put the "
            "adapter on the parent's output instead (place: output)."
        )


def check(model: nn.Module, *inputs: Any, **kwargs: Any) -> CheckReport:
    """Run one forward pass and name every active adapter that was never called.

    The pass runs in eval mode without gradients, and each module's mode is as before afterwards.

    Args:
        model: an injected model.
        inputs, kwargs: what the model is called with.

    Raises:
        StateError: if nothing is injected or no adapter is active.
    """
    root, state = require_state(model)
    if not state.active:
        raise StateError("no adapter is active, so none could be called: convpeft.set_active(model, name) first")
    watched = [
        (f"{key or '(root)'}: {name}", adapter_at(root, key, name))
        for name in state.active
        for key in state.adapters[name].layers
    ]
    called: set[str] = set()

    def note(label: str) -> Any:
        return lambda module, args, output: called.add(label)

    handles = [adapter.register_forward_hook(note(label)) for label, adapter in watched]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            model(*as_inputs(inputs), **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    labels = [label for label, _ in watched]
    return CheckReport(
        tuple(label for label in labels if label in called), tuple(label for label in labels if label not in called)
    )
