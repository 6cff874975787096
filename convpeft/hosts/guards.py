"""Guards: what others might do to an adapted module, or to one above it, that would lose an adapter is refused here.

They look at what is done, not at what it is called: a parameter of an adapted layer that is set anew, and a child that
is replaced or deleted while adapted layers are in it. What a whole method does is watched in ``transactions``.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

from ..convolution.nodes import is_compiling, serves
from ..errors import HostError
from .callers import frames, is_foreign, operation
from .copies import reduced, self_copying
from .displaced import note, take_back
from .slots import SLOT, Slots, base_class, slots_of
from .trainers import guard_trainers

_ADVICE = (
    "Call convpeft.merge(model) first, or convpeft.eject(model) if they may go; what {who} had changed around them was taken "
    "back."
)
_ASIDE = {"training", "__class__"}  # set often, and by convpeft itself


class Guard:
    """Mixin of the modules above adapted layers: a child is not replaced or deleted together with the adapters in it."""

    _modules: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if not is_compiling() and name not in _ASIDE:
            if name in self.__dict__.get("_modules", ()):
                refuse_loss(self, name, value)
            if sys._getframe(1).f_code.co_name != "forward":  # a forward pass fuses nothing
                note(self, name, value)  # type: ignore[arg-type]
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        refuse_loss(self, name, None)
        note(self, name)  # type: ignore[arg-type]
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child as usual, but not in the place of one with adapters in it."""
        refuse_loss(self, name, module)
        note(self, name, module)  # type: ignore[arg-type]
        super().add_module(name, module)  # type: ignore[misc]


class Guarded(Guard):
    """Mark of a class that stands in for a module's own, ``guarded_from``, and only guards its children."""

    guarded_from: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, self.guarded_from, _unguarded, guard, protocol)


@cache
def guarded_class(base: Any) -> Any:
    """Return the generated subclass of exactly ``base``, of the same name, that guards its children."""
    guard_trainers([base])
    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "guarded_from": base,
        **self_copying(base, guard),
    }
    return type(base.__name__, (Guarded, base), body)


def guard(module: nn.Module, slots: Any = None) -> None:
    """Guard a module's children from now on, in place; one whose class cannot be extended stays as it is."""
    if isinstance(module, (Guard, torch.jit.ScriptModule)):
        return
    own: Any = type(module)
    try:
        module.__class__ = guarded_class(own)
    except TypeError:  # its class has a layout of its own
        return


def release(module: nn.Module) -> None:
    """Give a module that is only guarded its own class back, in place."""
    if vars(type(module)).get("guarded_from") is not None:
        module.__class__ = type(module).guarded_from  # type: ignore[attr-defined]


def _unguarded(base: Any) -> nn.Module:
    """Return an empty module of the guarded class, for pickle to fill."""
    return guarded_class(base).__new__(guarded_class(base))


def refuse_loss(parent: Any, name: str, value: Any) -> None:
    """Raise if a child is about to be replaced or deleted by a function, and adapters with it.

    A line of a script that does so has decided to; convpeft says at its next use that the layer is gone.

    Raises:
        HostError: then; what the function had changed before is taken back.
    """
    old = parent._modules.get(name)
    if old is None or old is value or name == SLOT or not is_foreign():
        return
    lost = hosts_lost(old, value)
    if lost and (operation() or "weight" in next(frames()).f_code.co_names):
        who = next(frames()).f_code.co_name
        take_back()
        done = "deleting" if value is None else f"putting a {type(value).__name__} in the place of"
        at = f"{name}.{lost[0]}".rstrip(".")
        raise HostError(
            f"{who}: {done} {name!r} of this {base_class(parent).__name__} would lose the adapters of {at!r}. "
            + _ADVICE.format(who=who)
        )


def hosts_lost(old: nn.Module, value: Any) -> list[str]:
    """Return the names, below ``old``, of layers whose adapters would not be in ``value``; ``""`` is ``old`` itself."""
    hosts = {name: module for name, module in old.named_modules() if has_adapters(module)}
    if not hosts or not isinstance(value, nn.Module):
        return list(hosts)
    there = {id(module) for module in value.modules()}
    named = dict(value.named_modules())
    return [
        name
        for name, host in hosts.items()
        if id(host) not in there and _adapter_names(named.get(name)) != _adapter_names(host)
    ]


RESETS = ("reset_running_stats", "reset_parameters")


def unless_held(method: str) -> Any:
    """Return a norm's ``method`` that resets it, but leaves a held norm as it is, with a warning.

    ``torch.optim.swa_utils.update_bn`` resets every norm of a model and has them trained anew. A held norm would not train.
    """

    def reset(self: Any) -> None:
        if self._convpeft.held:
            warnings.warn(
                f"{self.adapted_from.__name__}.{method}() leaves a norm as it is that convpeft holds: it belongs to the frozen "
                "base, and its statistics would not come back. For statistics of the adapter's own inject with norm: adapt",
                stacklevel=2,
            )
        else:
            getattr(self.adapted_from, method)(self)

    reset.__name__ = method
    return reset


def has_adapters(module: nn.Module) -> bool:
    """Return whether a module has adapters on it, active or not."""
    slots = slots_of(module)
    return slots is not None and any(slots.adapters())


def _adapter_names(module: nn.Module | None) -> list[str]:
    slots = None if module is None else slots_of(module)
    return [] if slots is None else [name for name, _ in slots.adapters()]


def refuse_another_parameter(module: Any, slots: Slots | None, name: str, param: nn.Parameter | None) -> None:
    """Raise if a layer with adapters is about to get another weight or bias, other than by loading a state_dict.

    That is what fusing a norm into a layer leaves (``torch.nn.utils.fusion``): the weight is scaled, and the adapters,
    which nobody scaled, would be wrong.

    Raises:
        HostError: then; what the same function had changed before is taken back.
    """
    if slots is None or slots.loading or param is None or name not in ("weight", "bias"):
        return
    if name in module._parameters and param is not module._parameters[name] and any(slots.adapters()) and is_foreign():
        take_back()
        raise HostError(
            f"this {module.adapted_from.__name__} carries adapters, and giving it another bias or weight (fusing a norm into it?) "
            "would leave them at the wrong scale. Call convpeft.merge(model) first; to change the numbers alone, write into "
            "its data."
        )


FUSING_METHODS = ("fuse", "fuse_convs", "reparameterize", "switch_to_deploy", "convert_to_deploy", "deploy")


def swap_refusal(module: nn.Module) -> str | None:
    """Return why a module cannot have its class swapped, or None when it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module has no Python forward to extend"
    if slots_of(module) is None and SLOT in module._modules:
        return f"it has a child {SLOT!r} of its own, the very name convpeft needs here; rename that one"
    return None


def can_be_lean(module: nn.Module) -> bool:
    """Return whether a frozen module gains from the class swap without an adapter on it, and allows it."""
    return serves(base_class(module)) and "forward" not in module.__dict__ and swap_refusal(module) is None
