"""Copies and pickles of modules whose class is swapped, also of classes that copy themselves (``torch.fx.GraphModule``).

A GraphModule makes a new object of its graph when it is copied, and leaves behind what the graph does not name: our
class, our child, the records. They are put back here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .slots import Slots, slots_of

Mend = Callable[[Any, Slots | None], None]  # gives a bare copy the class, and the child, that its original has
_RECORDS = "_convpeft"  # what the attributes of a root begin with that hold records


def reduced(module: Any, base: Any, empty: Callable[[Any], nn.Module], mend: Mend, protocol: Any) -> Any:
    """Return what pickle needs to make a swapped module again.

    Args:
        module: of the swapped class.
        base: its own class.
        empty: makes an object of the swapped class without calling its constructor.
        mend: see ``Mend``; for a class that pickles itself.
        protocol: of pickle.
    """
    if base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:
        getstate = getattr(module, "__getstate__", None)
        return empty, (base,), module.__dict__ if getstate is None else getstate()
    function, args, *rest = base.__reduce_ex__(module, protocol)
    return _remade, (function, args, mend, slots_of(module)), *rest


def self_copying(base: Any, mend: Mend) -> dict[str, Any]:
    """Return what a class that stands in for ``base`` must override; nothing where ``base`` leaves copying to Python."""
    if not hasattr(base, "__deepcopy__"):
        return {}

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        slots = slots_of(self)
        with _own_class(self, base):
            copied = self.__deepcopy__(memo)
        for name, value in self.__dict__.items():
            if name.startswith(_RECORDS):
                copied.__dict__[name] = copy.deepcopy(value, memo)
        mend(copied, copy.deepcopy(slots, memo))
        _complete(copied, self, memo)
        return copied

    def recompile(self: Any) -> Any:
        with _own_class(self, base):  # it writes the new forward into the class
            return self.recompile()

    body: dict[str, Any] = {"__deepcopy__": deepcopy}
    if hasattr(base, "recompile"):
        body["recompile"] = recompile
    return body


def _complete(copied: nn.Module, original: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy the modules that it lacks and each module the mode that its original is in, in place."""
    for name, module in original.named_modules():
        path, _, last = name.rpartition(".")
        held = copied.get_submodule(path)._modules
        if name and last not in held:
            held[last] = copy.deepcopy(module, memo)
        twin, slots = copied.get_submodule(name), slots_of(module)
        twin.training = module.training
        twin_slots = slots_of(twin)
        if slots is not None and twin_slots is not None:
            twin_slots.wanted_training = slots.wanted_training


@contextmanager
def _own_class(module: Any, base: Any) -> Iterator[None]:
    """Let a module be of its own class inside the context: what it does to its class is meant for that one."""
    now = type(module)
    module.__class__ = base
    try:
        yield
    finally:
        module.__class__ = now


def _remade(function: Callable[..., Any], args: tuple[Any, ...], mend: Mend, slots: Slots | None) -> Any:
    module = function(*args)
    mend(module, slots)
    return module
