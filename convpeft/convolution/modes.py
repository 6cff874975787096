"""Torch's stack of function modes, which an interrupt inside torch's own code can leave one short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _len_torch_function_stack, _pop_mode, _push_mode


@contextmanager
def modes_kept() -> Iterator[None]:
    """Give the stack of function modes back as it was if anything is raised inside the context.

    Torch takes a mode off its stack while that mode works. After an interrupt in between, the mode is missing, and leaving
    it is a RuntimeError that hides the interrupt, or takes a mode of the user's: then the interrupt is raised.
    """
    before = _get_current_function_mode_stack()
    try:
        yield
    except BaseException as error:
        now = _get_current_function_mode_stack()
        if len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True)):
            for _ in range(_len_torch_function_stack()):
                _pop_mode()
            for mode in before:
                _push_mode(mode)
        if isinstance(error, RuntimeError) and "mode stack" in str(error) and error.__context__ is not None:
            raise error.__context__ from None
        raise


def making_on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which new tensors are made on a device; none is entered where they are made there anyway."""
    if device.type == "cpu" and not _len_torch_function_stack():
        return nullcontext()
    return _making_on(device)


@contextmanager
def _making_on(device: torch.device) -> Iterator[None]:
    with modes_kept(), device:
        yield
