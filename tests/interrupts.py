"""Interrupts at chosen lines of convpeft, and of torch where convpeft calls it; and a whole look at a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import convpeft

FOLDERS = tuple(os.path.dirname(module.__file__) + os.sep for module in (convpeft, torch))


class Lines:
    """Counts the lines that run inside a ``with`` block, and raises KeyboardInterrupt before one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.count, self.stop_at, self.raised = 0, stop_at, ""

    def _begin(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FOLDERS) else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.stop_at:
                self.raised = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
                sys.settrace(None)
                raise KeyboardInterrupt(self.raised)
        return self._line

    def __enter__(self) -> Lines:
        self.others = sys.gettrace()
        sys.settrace(self._begin)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self.others)


def lines_of(call: Callable[[], Any]) -> int:
    """Return how many lines a call runs."""
    with Lines() as lines:
        call()
    return lines.count


def interrupted(call: Callable[[], Any], line: int) -> str:
    """Make a call, with an interrupt before its n-th line; return where that was, or nothing if it ended before."""
    lines = Lines(line)
    try:
        with lines:
            call()
    except KeyboardInterrupt:
        torch.set_grad_enabled(True)  # torch's own no_grad may have been interrupted
    return lines.raised


def outputs(model: nn.Module, x: Tensor) -> Any:
    """Return what the model gives now, in the mode it is in; its buffers are as before afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.no_grad():
        found = model(x).clone()
        for buffer, before in buffers:
            buffer.copy_(before)
    return found


def look(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return all there is to see of a model without calling convpeft: what it gives first of all."""
    state = model.__dict__.get("_convpeft_state")
    return {
        "output": outputs(model, x),
        "bits": {key: value.clone() for key, value in model.state_dict().items() if "_stash" not in key},
        "stored": {key: value.clone() for key, value in sorted(model.state_dict().items()) if "_stash" in key},
        "trains": {name: p.requires_grad for name, p in sorted(model.named_parameters())},
        "modes": {name: module.training for name, module in model.named_modules() if "_stash" not in name},
        "classes": [type(module) for name, module in model.named_modules() if "_stash" not in name],
        "own": [sorted(module.__dict__) for name, module in model.named_modules() if "_stash" not in name],
        "hooks": [[_described(hook) for hook in module._forward_hooks.values()] for module in model.modules()],
        "active": None if state is None else state.active,
        "trained": None if state is None else state.trained,
        "names": None if state is None else list(state.adapters),
        "torch's modes": torch._C._len_torch_function_stack(),
        "inside": None if state is None else (state.routed, len(state.blocks), state.journal),
        "routers": [module.router for module in model.modules() if type(module).__name__ == "Slots"],
    }


def differences(first: Any, second: Any) -> list[str]:
    """Return the names of what two looks differ in."""
    return [key for key in first if not _same(first[key], second[key])]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(_same(first[key], second[key]) for key in first)
    return bool(first == second)


def _described(hook: Any) -> Any:
    """Return a hook in a form that is equal for equal partials."""
    return (hook.func, hook.args, sorted(hook.keywords.items())) if isinstance(hook, partial) else hook
