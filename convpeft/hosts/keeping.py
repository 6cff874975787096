"""What trains stays so: held through the user's own ``train()``, and not frozen by somebody else in silence.

Detectors freeze stages and norms in a ``train()`` of their own, which runs after the optimizer was built and reaches into
adapters. Such a class is swapped, and what trains below it is as before when its ``train()`` ends. Any other code that
freezes all of an adapter's parameters on a layer is met by an error in the next forward pass that would have trained it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..convolution.nodes import is_compiling
from ..errors import StateError
from .modules import is_batchnorm_like
from .slots import Slots, base_class, slots_of


def overrides_train(module: nn.Module | type) -> bool:
    """Return whether the class of a module, or a class, has a ``train()`` that is not torch's own."""
    base: Any = base_class(module) if isinstance(module, nn.Module) else module
    owner = next(each for each in base.__mro__ if "train" in vars(each))
    return not owner.__module__.startswith("torch.nn.")


@contextmanager
def kept_training(module: nn.Module, mode: bool) -> Iterator[None]:
    """Let what trains in a module and below be as before when the block ends, which sets the training mode ``mode``.

    Each tensor of an adapter requires a gradient or not, as it did; adapters that train have the mode that was asked for,
    and so have norms that are theirs to adapt.
    """
    hosts = [(each, slots) for each in module.modules() if (slots := slots_of(each)) is not None]
    flags = [(parameter, parameter.requires_grad) for host, slots in hosts for parameter in _ours(host, slots)]
    yield
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
    for host, slots in hosts:
        if _trained(slots):
            slots.train(mode)
            if slots.shown is not None and not slots.held and is_batchnorm_like(host):
                host.training = slots.wanted_training = mode


def _ours(host: nn.Module, slots: Slots) -> Iterator[nn.Parameter]:
    """Yield the parameters of adapters and of unfrozen tensors in a module."""
    yield from slots.parameters()
    if slots.shown is not None:
        yield from (parameter for parameter in host._parameters.values() if parameter is not None)


def _trained(slots: Slots) -> tuple[str, ...]:
    """Return the adapters that take part in a module's forward pass and are to train; none inside ``using``."""
    state = slots.state
    if state is None or not state.trained or state.resting:
        return ()
    shown = () if slots.shown is None or slots.shown in slots.active else (slots.shown,)
    return tuple(name for name in (*slots.active, *shown) if name in state.trained)


def require_training(module: nn.Module, slots: Slots) -> None:
    """Raise if this pass should train an adapter of the module, and somebody has frozen all of it; else do nothing.

    Raises:
        StateError: naming the layer and the adapter.
    """
    if is_compiling() or not torch.is_grad_enabled():
        return
    for name in _trained(slots):
        if is_frozen(module, slots, name) and torch._C._current_graph_task_id() == -1:  # no recomputation in backward
            raise StateError(
                f"{slots.key or '(root)'}: the adapter {name!r} is to train, but all its parameters here were frozen after it "
                "was made active (requires_grad=False, by a freeze() method or a hook?), and this pass would train less without "
                f"a word. convpeft.set_active(model, {name!r}) lets it train again; inside convpeft.using(model, {name!r}) it "
                "runs without training; the model is unchanged."
            )


def is_frozen(module: nn.Module, slots: Slots, name: str) -> bool:
    """Return whether an adapter on a module, or its values of the module's tensors, has parameters and none that trains."""
    adapter = slots.get(name)
    if adapter is not None and _all_frozen(adapter):
        return True
    return slots.shown == name and _requires(module) is False


def _all_frozen(adapter: nn.Module) -> bool:
    if _requires(adapter):  # as good as always, and the quickest to find out
        return False
    found = [_requires(each) for each in adapter.modules()]
    return True not in found and False in found


def _requires(module: nn.Module) -> bool | None:
    """Return whether one of a module's own parameters requires a gradient; None if there are none to tell from.

    What ``functional_call`` or a sharded model puts in their place are no parameters, and tell nothing.
    """
    found = None
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            if parameter.requires_grad or not isinstance(parameter, nn.Parameter):
                return True
            found = False
    return found
