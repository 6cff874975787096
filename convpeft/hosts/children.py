"""The children of an adapted module as others meet them: its own, without the child that convpeft gives it.

Code that walks ``children()`` or ``_modules``, and a ``Sequential`` that runs, slices or edits its steps, must find what the
bare class would. So the slots are kept beside the children, under ``HOME`` in the module's attributes, and a module's own
protocols (``named_modules``, ``state_dict``, ``_apply``, ...) are extended in ``swap``. Here is the dict that ``_modules``
becomes: its iteration leaves the slots out, and the key ``convpeft`` finds them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

from torch import nn

from ..convolution.nodes import is_compiling
from .slots import HOME, SLOT, Slots

# Torch's own walks over children that need every parameter, and that no method of a module takes part in.
_WALKS = (
    "torch.jit._trace",
    "torch.distributed.fsdp._fully_shard.",
    "torch.distributed.fsdp._init_utils",
    "torch.distributed._composable.",
    "torch.nn.modules.batchnorm",  # convert_sync_batchnorm
    "accelerate.",
)


class _Hiding:
    """Mixin of a dict of children that finds the slots under ``convpeft`` and does not count them."""

    slots: Slots | None = None

    def __missing__(self, key: str) -> Any:
        if key == SLOT and self.slots is not None:
            return self.slots
        raise KeyError(key)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(key) or (key == SLOT and self.slots is not None)  # type: ignore[misc]

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the child of that name, or the slots for ``convpeft``; else the default."""
        return super().get(key, default if key != SLOT or self.slots is None else self.slots)  # type: ignore[misc]

    def items(self) -> Any:
        """Return the module's own children with their names; for some of torch's own walks, the slots as well."""
        if self.slots is not None and not is_compiling() and is_walk(sys._getframe(1)) and self.slots._modules:
            return {**dict(super().items()), SLOT: self.slots}.items()  # type: ignore[misc]
        return super().items()  # type: ignore[misc]

    def copy(self) -> Any:
        """Return a shallow copy that finds the same slots."""
        copied: Any = type(self)(super().items())  # type: ignore[call-arg,misc]
        copied.slots = self.slots
        return copied


class Children(_Hiding, dict):
    """For a module that keeps its children in a dict."""


class OrderedChildren(_Hiding, OrderedDict):
    """For one that keeps them in an ``OrderedDict``, as older torch does, and ``nn.Sequential`` after ``del``."""


def is_walk(frame: Any) -> bool:
    """Return whether the code of a frame is one of torch's own walks that have to meet the slots as a child."""
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and name.startswith(_WALKS)


def hide(module: nn.Module, slots: Slots) -> None:
    """Keep slots in a module without making them one of its children, in place."""
    module.__dict__[HOME] = slots
    hide_again(module)


def hide_again(module: nn.Module) -> None:
    """Let ``_modules`` find a module's slots again, in place, after somebody replaced that dict."""
    children: Any = module.__dict__["_modules"]
    if not isinstance(children, _Hiding):
        kind: Any = OrderedChildren if isinstance(children, OrderedDict) else Children
        module.__dict__["_modules"] = children = kind(children)
    children.slots = module.__dict__[HOME]


def take_away(module: nn.Module) -> None:
    """Take the slots out of a module, in place; ``_modules`` is the plain dict again that it was."""
    children: Any = module.__dict__["_modules"]
    if isinstance(children, _Hiding):
        plain: Any = OrderedDict if isinstance(children, OrderedDict) else dict
        module.__dict__["_modules"] = plain(children)
    module.__dict__.pop(HOME, None)
