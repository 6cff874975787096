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
    return not owner.__module__.startswith("torch.")


def note_mode(slots: Slots, mode: bool) -> None:
    """Note in the records that a swapped module is in training mode now, or no longer, in place."""
    if slots.state is not None:
        (slots.state.in_training.add if mode else slots.state.in_training.discard)(slots.key)


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
            note_mode(slots, mode)
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
    if not torch.is_grad_enabled() or is_compiling():
        return
    state = slots.state
    if state is None or not state.trained or not (slots.training or state.in_training):
        return  # a stage in eval mode counts while the rest of the model trains
    for name in _trained(slots):
        adapter = slots._modules.get(name)
        quick = adapter is None or _trains(adapter)  # as good as always
        if quick and slots.shown != name:
            continue
        if is_frozen(module, slots, name) and torch._C._current_graph_task_id() == -1:  # no recomputation in backward
            raise StateError(
                f"{slots.key or '(root)'}: the adapter {name!r} is to train, but all its parameters here were frozen after it "
                "was made active (requires_grad=False, by a freeze() method or a hook?), and this pass would train less without "
                f"a word. convpeft.set_active(model, {name!r}) lets it train again; inside convpeft.using(model, {name!r}) it "
                "runs without training; the model is unchanged."
            )


def is_frozen(module: nn.Module, slots: Slots, name: str) -> bool:
    """Return whether an adapter on a module, or its values of the module's tensors, has parameters and none that trains."""
    adapter = slots._modules.get(name)
    if adapter is not None and not _trains(adapter):
        return any(_is_parameter(tensor) for part in adapter.modules() for tensor in part._parameters.values())
    if slots.shown != name:
        return False
    own = module._parameters.values()
    return any(map(_is_parameter, own)) and not any(tensor is not None and tensor.requires_grad for tensor in own)


def _trains(module: nn.Module) -> bool:
    """Return whether a parameter of a module, or of one below, requires a gradient."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            return True
    return any(child is not None and _trains(child) for child in module._modules.values())


def _is_parameter(tensor: Any) -> bool:
    """Return whether this could require a gradient; what ``functional_call`` or sharding put in its place tells nothing."""
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
