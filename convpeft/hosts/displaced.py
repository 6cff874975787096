"""What a function has changed so far at the parents of adapted layers, so that a refusal can take all of it back.

A function that fuses layers may set a new child first and delete the adapted one last. When the deletion is refused, what
the same function did before has to go, or the model would run on the new child.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from .callers import is_foreign, operation

_PLACES = ("__dict__", "_modules", "_parameters", "_buffers")
_SIMPLE = (bool, int, float, str, type(None), nn.Module, nn.Parameter)
_here = threading.local()
Key = tuple[int, int, int]


@dataclass(frozen=True)
class _Entry:
    """One attribute of a module before it was changed: its value in each place, and the order of the children."""

    module: nn.Module
    name: str
    values: dict[str, Any]
    order: list[str]


def note(module: nn.Module, name: str, value: Any = None) -> None:
    """Remember an attribute of a module that is about to be changed by a function which was handed a module.

    Tensors and other large objects are not remembered; what was is forgotten with the next function's first change.
    """
    if (
        "_modules" not in module.__dict__
        or (not isinstance(value, _SIMPLE) and not callable(value))
        or not is_foreign()
    ):
        return
    frames = operation()
    if not frames:
        return
    key = _key(frames[-1])
    if getattr(_here, "key", None) != key:
        _here.key, _here.entries = key, []
    places = {place: module.__dict__ if place == "__dict__" else module.__dict__.get(place, {}) for place in _PLACES}
    values = {place: held[name] for place, held in places.items() if name in held}
    _here.entries.append(_Entry(module, name, values, list(module._modules)))


def take_back() -> None:
    """Undo, in place, what the function that is running now has changed so far."""
    frames = operation()
    if not frames or getattr(_here, "key", None) != _key(frames[-1]):
        return
    for entry in reversed(_here.entries):
        module = entry.module
        for place in _PLACES:
            held = module.__dict__ if place == "__dict__" else module.__dict__.get(place, {})
            if place in entry.values:
                held[entry.name] = entry.values[place]
            else:
                held.pop(entry.name, None)
        for name in entry.order:
            if name in module._modules:
                module._modules[name] = module._modules.pop(name)
    _here.entries = []


def _key(frame: FrameType) -> Key:
    """Return what tells one run of a function from another: the frame, and the place it was called from."""
    caller = frame.f_back
    return id(frame), id(frame.f_code), -1 if caller is None else caller.f_lasti
