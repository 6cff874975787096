"""Copies to run in place of the user's modules, and a state of torch that a run leaves as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.modules import base_modules
from ..hosts.trials import private_copy, unobserved
from ..hosts.uncompiled import uncompiled
from .contracts import contract
from .shapes import Latest


def quiet_copy(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode without the user's hooks, which would see inputs that are none of theirs.

    Hooks that belong to the model stay: those of libraries (``weight_norm``, pruning, a factored merge), and methods of
    its modules.
    """
    copy = private_copy(module)
    for part in copy.modules():
        part.training = False
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not _belongs(hook):
                    del hooks[key]
    return copy


def _belongs(hook: Any) -> bool:
    """Return whether a hook is a method of a module, or of an installed library."""
    hook = getattr(hook, "func", hook)  # of a partial
    if isinstance(getattr(hook, "__self__", None), nn.Module):
        return True
    home = (getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0]
    file = getattr(sys.modules.get(home), "__file__", None) or ""
    return home in ("torch", "convpeft") or "site-packages" in file or "dist-packages" in file


@contextmanager
def layers_noted(copy: nn.Module) -> Iterator[list[Latest]]:
    """Keep what the last layer that ran returned, among those whose channels' axis is certain, while ``copy`` runs."""
    latest: list[Latest] = []

    def note(axis: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                latest[:] = [(tuple(output.shape), axis)]

        return hook

    handles = []
    for _, module in base_modules(copy):
        shape = contract(module)
        if shape is not None:
            handles.append(module.register_forward_hook(note(-1 if shape.channels_last else -3)))
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Run without gradients, as written where parts are compiled, and leave the random numbers as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), uncompiled(), unobserved():
        yield
