"""What a tree of modules is made of at one moment, and the way back to it: for what may fail, or be refused, half-way."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .trials import set_requires_grad


class Snapshot:
    """The classes, attributes, children and tensors of a module and of all below it, by reference: no number is copied.

    A tensor whose numbers are overwritten afterwards comes back only if ``keep`` was called before.

    Attributes:
        modules: every module of the tree, its class, and its attributes with the content of those that are containers.
        tensors: every parameter and buffer, where its numbers are, and whether it requires a gradient.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = [(module, type(module), _attributes(module)) for module in root.modules()]
        self.tensors: list[tuple[Tensor, Tensor, bool]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        seen: set[int] = set()
        for module, _, _ in self.modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.tensors.append((tensor, tensor.data, tensor.requires_grad))

    def keep(self, tensor: Tensor) -> None:
        """Remember the numbers of a tensor as they are now, unless that was done before."""
        if id(tensor) not in self._values:
            self._values[id(tensor)] = (tensor, tensor.detach().clone())

    def attribute(self, module: nn.Module, name: str) -> Any:
        """Return what an attribute of a module's own was, or None."""
        return next((held[name][0] for each, _, held in self.modules if each is module and name in held), None)

    def restore(self) -> None:
        """Give every module back what it had, in place."""
        for module, own, attributes in self.modules:
            if type(module) is not own:
                module.__class__ = own
            for name in [name for name in module.__dict__ if name not in attributes]:
                del module.__dict__[name]
            for name, (value, content) in attributes.items():
                module.__dict__[name] = value
                if content is not None:
                    _refill(value, content)
        with torch.no_grad():
            for tensor, data, requires_grad in self.tensors:
                if not same_place(tensor, data):
                    tensor.data = data
                set_requires_grad(tensor, requires_grad)
            for tensor, value in self._values.values():
                tensor.data.copy_(value)


def same_place(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors look at the same numbers in the same way."""
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    try:
        return first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    except RuntimeError:  # no storage: fake, sparse, a subclass
        return True


def _attributes(module: nn.Module) -> dict[str, tuple[Any, list[Any] | None]]:
    return {name: (value, _content(value)) for name, value in module.__dict__.items()}


def _content(value: Any) -> list[Any] | None:
    """Return what is in a container that is changed in place, or None for any other value."""
    if isinstance(value, dict):  # a subclass may hide entries from iteration, and has to get them back as well
        return list(_plain(value).items(value))
    return list(value) if isinstance(value, (list, set)) else None


def _refill(value: Any, content: list[Any]) -> None:
    """Put the content back into a container, in place; nothing is written to one that still has it."""
    now = _content(value)
    if now is not None and len(now) == len(content) and all(map(_is_same_entry, now, content)):
        return
    if isinstance(value, dict):
        kind = _plain(value)
        kind.clear(value)
        for key, each in content:
            kind.__setitem__(value, key, each)
    elif isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)


def _plain(value: dict) -> Any:
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _is_same_entry(first: Any, second: Any) -> bool:
    """Return whether two entries are the same objects; those of a dict are pairs, made anew when they are asked for."""
    pairs = isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second) == 2
    return first is second or (pairs and first[0] is second[0] and first[1] is second[1])
