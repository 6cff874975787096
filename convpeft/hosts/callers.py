"""Who is changing a module at this moment: the code that asked for it, and the function that was handed the module."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

_FUSING = ("torch.nn.utils.fusion", "torch.ao.", "torch.quantization", "torch.fx.experimental.optimization")
_OURS = __name__.split(".", 1)[0] + "."
_PASSING_ON = {"__setattr__", "__delattr__", "register_parameter", "add_module", "register_module", "set_submodule"}
_DEEP = 30  # frames that are looked at


def frames() -> Iterator[FrameType]:
    """Yield the frames of the code that changes a module, innermost first; those that only pass the change on are left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _passes_on(frame):
        frame = frame.f_back
    for _ in range(_DEEP):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def is_foreign() -> bool:
    """Return whether code from outside asks for a change: neither convpeft, nor torch where it changes what a module is made of.

    torch's own pruning, parametrisation, loading and sharding replace parameters and keep what the layer computes, or
    are known to the rest of convpeft. Its functions that fuse norms do not.
    """
    name = _module_of(next(frames()))
    return not name.startswith(_OURS) and (not name.startswith("torch.") or name.startswith(_FUSING))


def operation() -> list[FrameType]:
    """Return the frames of the functions, innermost first, that were handed a module and now change it; none in a script's own line."""
    found: list[FrameType] = []
    for frame in frames():
        if takes_module(frame):
            found.append(frame)
        elif not frame.f_code.co_name.startswith("<") or frame.f_code.co_name == "<module>":
            break  # a comprehension or a lambda belongs to the function around it
    return found


def takes_module(frame: FrameType) -> bool:
    """Return whether a function was called with a module: its ``self``, or another argument."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    values = (frame.f_locals.get(name) for name in code.co_varnames[:count])
    return any(isinstance(value, nn.Module) for value in values)


def _passes_on(frame: FrameType) -> bool:
    name = _module_of(frame)
    if name.startswith(_OURS + "hosts."):
        return True
    return name in ("torch.nn.modules.module", "torch.nn.modules.container") and (
        frame.f_code.co_name in _PASSING_ON or name.endswith("container")
    )


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
