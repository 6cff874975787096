"""Which tensors belong to the samples of a routed batch: told by what they were computed from, not by their length.

A routed layer may take a tensor that is the same for all samples (class embeddings, say) and has as many rows as there
are samples by chance. A length tells nothing there, so inside ``route`` every operation hands on where its operands come from.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_flatten

from ..convolution.nodes import is_compiling
from ..hosts.journal import all_modules

_NUMBERS = {int, float, bool, str, torch.Size, torch.dtype, torch.device, torch.layout}
_CALL = nn.Module._call_impl.__code__


class Origin(IntEnum):
    """Where a tensor comes from; of several operands the greatest counts."""

    UNKNOWN = 0  # made from nothing (zeros, noise), or outside a call of the model
    OWN = 1  # the model's own tensors alone: the same for all samples
    INPUT = 2  # an input of the model that may or may not have a row for each sample
    SAMPLES = 3  # the input that holds the samples


class Origins(TorchFunctionMode):
    """Keeps the origin of every tensor that is computed inside a ``with`` block.

    Args:
        root: the routed model.
        count: of the samples.
        shared: inputs that are the same for all samples; None: it is not known which are.

    Attributes:
        is_paused: nothing is kept at the moment.
    """

    def __init__(self, root: nn.Module, count: int, shared: Iterable[Tensor] | None) -> None:
        super().__init__()
        self.root, self.count, self.is_paused = root, count, False
        self.shared = None if shared is None else {id(tensor) for tensor in shared}
        self._noted: dict[int, tuple[weakref.ref, Origin]] = {}
        self._storages: set[int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self.is_paused or type(result) in _NUMBERS or is_compiling():
            return result
        made = args[:1] if result is None else (result,)  # setitem returns nothing
        operands = (*args, *kwargs.values()) if kwargs else args
        if any(self._told(each) is Origin.SAMPLES for each in operands):
            self.note(_tensors(made), Origin.SAMPLES)
        elif tensors := list(_tensors(made)):
            self.note(tensors, max(map(self.of, _tensors(operands)), default=Origin.UNKNOWN))
        return result

    def close(self) -> None:
        """Stop keeping anything, in place; an interrupt may have left the mode among torch's."""
        self.is_paused = True
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def note(self, tensors: Iterable[Tensor], origin: Origin) -> None:
        """Note where tensors come from; one that an operation wrote into keeps the greater origin."""
        for tensor in tensors:
            if origin > self._told(tensor):
                key = id(tensor)
                forget = weakref.ref(tensor, lambda _, key=key: self._noted.pop(key, None))  # type: ignore[misc]
                self._noted[key] = (forget, origin)

    def of(self, tensor: Tensor) -> Origin:
        """Return where a tensor comes from."""
        told = self._told(tensor)
        if told is not Origin.UNKNOWN:
            return told
        found = Origin.OWN if _storage(tensor) in self._own() else self._as_input(tensor)
        self.note([tensor], found)
        return found

    def _told(self, value: Any) -> Origin:
        noted = self._noted.get(id(value))
        return noted[1] if noted is not None and noted[0]() is value else Origin.UNKNOWN

    def _own(self) -> set[int]:
        """Return where the numbers of the model's own tensors are: parameters, buffers, and plain attributes."""
        if self._storages is None:
            values = [
                value for module in all_modules(self.root).values() for value in (*_registered(module), *_plain(module))
            ]
            self._storages = {_storage(value) for value in _tensors(values)} - {0}
        return self._storages

    def _as_input(self, tensor: Tensor) -> Origin:
        """Return the origin of what may be an input of the call of the model that is running."""
        inputs = [leaf for leaf in _tensors(self._inputs()) if leaf.ndim and leaf.shape[0] == self.count]
        if not any(leaf is tensor for leaf in inputs):
            return Origin.UNKNOWN
        if self.shared is not None:
            return Origin.OWN if id(tensor) in self.shared else Origin.SAMPLES
        first = max(inputs, key=lambda leaf: leaf.ndim)  # of those with most axes the first
        return Origin.SAMPLES if tensor is first or tensor.shape == first.shape else Origin.INPUT

    def _inputs(self) -> list[Any]:
        """Return what the running call of the model was given."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals["self"] is self.root:
                return tree_flatten((frame.f_locals["args"], frame.f_locals["kwargs"]))[0]
            frame = frame.f_back
        return []


def _registered(module: nn.Module) -> list[Any]:
    return [*module._parameters.values(), *module._buffers.values()]


def _plain(module: nn.Module) -> Iterator[Any]:
    """Yield a module's plain attributes, and what is in those that are lists, tuples or dicts."""
    for name, value in module.__dict__.items():
        if not name.startswith("_"):
            yield from value.values() if isinstance(value, dict) else [value]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)) and type(value) is not torch.Size:
            yield from (entry for entry in value if isinstance(entry, Tensor))


def _storage(tensor: Tensor) -> int:
    """Return where a tensor's numbers are; 0 for one without a storage."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
