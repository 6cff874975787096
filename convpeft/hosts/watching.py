"""Watch one forward pass: which modules ran, and whose weights were read by somebody else.

Hooks on the modules themselves would change what is watched (``nn.TransformerEncoderLayer`` leaves its fast path when
there are any), so torch's global hooks tell which modules run, and a dispatch mode sees every tensor that an operation
takes, whatever it was called by the time it got there: a view, ``.data``, an argument of a fused kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .modules import base_class, base_modules
from .swap import Adapted
from .uncompiled import uncompiled


@dataclass(frozen=True)
class Watched:
    """What a forward pass did.

    Attributes:
        ran: ``id`` of every module that was called.
        readers: by ``id`` of a watched module, who read a tensor of it while it did not run, in words.
    """

    ran: set[int] = field(default_factory=set)
    readers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Held:
    """A tensor's place in its storage, the modules it belongs to, and the watched ones it is part of."""

    start: int
    end: int
    owners: tuple[nn.Module, ...]
    hosts: tuple[nn.Module, ...]


def watched_run(root: nn.Module, hosts: Iterable[nn.Module], run: Callable[[], Any]) -> Watched:
    """Call ``run`` in eval mode without gradients, and return what it did with ``root``'s modules.

    Each module's mode is as before afterwards. Reading a bias does not count, nor does looking at a dtype or a shape.

    Args:
        root: the model whose modules are known by name.
        hosts: the modules to watch: a read of a parameter of theirs, or below, counts when neither the host nor the
            module that the parameter belongs to is running.
        run: calls the model.
    """
    modes = [(module, module.training) for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), watching(root, hosts) as found:
            run()
    finally:
        for module, mode in modes:
            module.training = mode
    return found


@contextmanager
def watching(root: nn.Module, hosts: Iterable[nn.Module]) -> Iterator[Watched]:
    """Note, inside the context, which modules run, and who reads the watched ones past them; see ``watched_run``."""
    found = Watched()
    with uncompiled(), _stack(found) as running, _Reads(root, hosts, running, found):
        yield found


@contextmanager
def _stack(found: Watched) -> Iterator[list[nn.Module]]:
    """Keep the modules that are running at the moment, innermost last."""
    running: list[nn.Module] = []

    def begin(module: nn.Module, args: Any) -> None:
        found.ran.add(id(module))
        running.append(module)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        while running and running.pop() is not module:  # whatever lies on top of it has ended too
            pass

    handles = [register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


class _Reads(TorchDispatchMode):
    """Notes each operation that takes a tensor of a watched module from outside."""

    def __init__(self, root: nn.Module, hosts: Iterable[nn.Module], running: list[nn.Module], found: Watched) -> None:
        super().__init__()
        self.running, self.found = running, found
        self.names = {id(module): name for name, module in reversed(base_modules(root))}
        self.held = _held(root, list(hosts))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if not _only_looks(func):
            for value in tree_flatten((args, kwargs))[0]:
                if isinstance(value, Tensor):
                    self._note(value, func)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor, func: Any) -> None:
        for held in self.held.get(_storage(tensor), ()):
            if _overlap(held, tensor):
                for host in held.hosts:
                    if id(host) not in self.found.readers and not self._is_running((host, *held.owners)):
                        self.found.readers[id(host)] = f"{self._reader()} in {func}"

    def _is_running(self, modules: tuple[nn.Module, ...]) -> bool:
        """Return whether one of the modules is running: it was called, or its forward was."""
        wanted = {id(module) for module in modules}
        if any(id(module) in wanted for module in self.running):
            return True
        frame: Any = sys._getframe()
        while frame is not None:
            owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
            if id(owner) in wanted and (not isinstance(owner, Adapted) or frame.f_code is Adapted.forward.__code__):
                return True
            frame = frame.f_back
        return False

    def _reader(self) -> str:
        for module in reversed(self.running):
            if id(module) in self.names:
                return f"{self.names[id(module)] or '(root)'} ({base_class(module).__name__})"
        return "the code around the model"


def _held(root: nn.Module, hosts: list[nn.Module]) -> dict[int, list[_Held]]:
    """Return the parameters of the watched modules by the storage they are in."""
    owners: dict[int, list[nn.Module]] = {}
    for _, module in base_modules(root):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    parts: dict[int, tuple[Tensor, list[nn.Module]]] = {}
    for host in hosts:
        for _, module in base_modules(host):
            for name, parameter in module._parameters.items():
                if parameter is not None and name != "bias":
                    parts.setdefault(id(parameter), (parameter, []))[1].append(host)
    held: dict[int, list[_Held]] = {}
    for key, (tensor, inside) in parts.items():
        start, end = _extent(tensor)
        held.setdefault(_storage(tensor), []).append(_Held(start, end, tuple(owners.get(key, ())), tuple(inside)))
    held.pop(0, None)
    return held


def _only_looks(func: Any) -> bool:
    """Return whether an operation makes a view or something like its operand, and so reads no number of it."""
    name = str(func.name()).split("::")[-1].split(".")[0]
    return getattr(func, "is_view", False) or name.endswith("_like") or name.startswith("new_") or name == "detach"


def _storage(tensor: Tensor) -> int:
    """Return where a tensor's numbers are; 0 for one without a storage."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one after the last."""
    last: int = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, width = int(tensor.storage_offset()), tensor.element_size()
    return start * width, (start + last + (tensor.numel() > 0)) * width


def _overlap(held: _Held, tensor: Tensor) -> bool:
    start, end = _extent(tensor)
    return start < held.end and held.start < end
