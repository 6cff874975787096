"""Threads: who is running a model at the moment, and the gate that keeps others out while its adapters are one thread's alone.

A forward pass costs nothing for this: who wants to change a model looks at the stacks of the other threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..convolution.nodes import is_compiling
from ..errors import StateError
from .journal import all_modules
from .slots import base_class

_CALLS = {"_wrapped_call_impl", "_call_impl", "forward"}
_WAITING = {"threading", "queue", "selectors", "socket", "socketserver", "multiprocessing", "concurrent", "asyncio"}


def require_alone(root: nn.Module) -> None:
    """Raise if another thread is running the model or a part of it at this moment.

    Raises:
        StateError: naming the thread.
    """
    for thread, called in _elsewhere():
        inside = all_modules(root)
        for module in called:
            if id(module) in inside or any(child is root for child in module._modules.values()):
                raise StateError(
                    f"thread {_name(thread)!r} is running this {base_class(root).__name__}, and its adapters cannot be changed "
                    "under a forward pass: wait for the pass to end, or give each thread a model of its own (copy.deepcopy); "
                    "the model is unchanged."
                )


def _elsewhere() -> Iterator[tuple[int, list[nn.Module]]]:
    """Yield each other thread with the modules that it is running."""
    if threading.active_count() == 1 and len(sys._current_frames()) == 1:
        return
    for thread, top in sys._current_frames().items():
        if thread != threading.get_ident() and (called := _running(top)):
            yield thread, called


def _running(top: FrameType) -> list[nn.Module]:
    """Return the modules whose methods are on a stack; of a thread that waits (for jobs, say), those being called only."""
    waits = top.f_globals.get("__name__", "").split(".")[0] in _WAITING
    found: list[nn.Module] = []
    frame: FrameType | None = top
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and (code.co_name in _CALLS or not waits):
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, nn.Module):
                found.append(owner)
        frame = frame.f_back
    return found


def thread_of(code: Any, name: str, value: Any) -> int | None:
    """Return the thread in which a function of this ``code`` runs with this value of a local variable; else None."""
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code is code and frame.f_locals.get(name) is value:
                return thread
            frame = frame.f_back
    return None


def _name(thread: int) -> str:
    return next((each.name for each in threading.enumerate() if each.ident == thread), str(thread))


class Gate:
    """Lets one thread alone through adapted layers: the one that entered a ``with`` block, or that is changing adapters.

    Autograd's threads, which run a checkpointed part anew, and the replicas of ``nn.DataParallel`` belong to a pass of that
    thread and go through.

    Attributes:
        what: the thread is doing, in words.
    """

    def __init__(self, what: str, thread: int | None = None) -> None:
        self.what = what
        self.thread = threading.get_ident() if thread is None else thread

    @property
    def is_elsewhere(self) -> bool:
        """Whether the gate belongs to another thread that still runs."""
        return self.thread != threading.get_ident() and self.thread in sys._current_frames()

    def require_thread(self, module: Any) -> None:
        """Raise a StateError if this is another thread than the gate's; asked by adapted layers when they are called."""
        if not self.is_elsewhere or torch._C._current_graph_task_id() != -1:
            return
        if "_is_replica" not in module.__dict__:  # of DataParallel
            raise self.refusal(module)

    def refusal(self, module: Any) -> StateError:
        """Return the error for a pass of another thread."""
        return StateError(
            f"thread {_name(self.thread)!r} {self.what}, and this {base_class(module).__name__} was called in thread "
            f"{threading.current_thread().name!r}: run the model in one thread at a time, or give each thread a model of its own "
            "(copy.deepcopy)."
        )

    def run(self, module: Any, slots: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an adapted layer gives, in the gate's own thread."""
        if not is_compiling():
            self.require_thread(module)
        return module.adapted_forward(*args, **kwargs)


class Block(Gate):
    """A ``with`` block that changes what is active for one thread: ``using``, ``disabled`` and ``route``.

    Attributes:
        slots: of the layers that the block changes.
        rests: nothing has to train inside it.
    """

    rests = False

    def __init__(self, what: str, slots: list[Any]) -> None:
        super().__init__(what)
        self.slots = slots
