"""Guards: what others might do to an adapted module that would lose its adapter is refused here."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..convolution.nodes import serves
from ..errors import HostError
from .slots import SLOT, Slots, base_class, slots_of


def refusing(method: str) -> Any:
    """Return a method that raises a HostError, to stand in an adapted module's class for a fusing ``method``."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise HostError(
            f"{self.adapted_from.__name__}.{method}() would rewrite layers that carry adapters and lose them. "
            "Call convpeft.merge(model) first (or convpeft.eject(model) to drop them); the model is unchanged."
        )

    refuse.__name__ = method
    return refuse


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


def refuse_another_bias(module: Any, slots: Slots | None) -> None:
    """Raise if a layer with adapters is about to get another bias, other than by loading a state_dict.

    That is what fusing a norm into a layer leaves (``torch.nn.utils.fusion``): the weight is scaled, and the adapters,
    which nobody scaled, would be wrong.

    Raises:
        HostError: then.
    """
    if slots is not None and not slots.loading and "bias" in module._parameters and any(slots.adapters()):
        raise HostError(
            f"this {module.adapted_from.__name__} carries adapters, and giving it another bias (fusing a norm into it?) would "
            "leave them at the wrong scale. Call convpeft.merge(model) first; to change the bias alone, write into its data."
        )


FUSING_METHODS = ("fuse", "fuse_convs", "reparameterize", "switch_to_deploy", "convert_to_deploy", "deploy")


def fusing_methods(owner: Any) -> list[str]:
    """Return the methods of a class, or of a module's own class, that rewrite layers by what their weights say."""
    owner = base_class(owner) if isinstance(owner, nn.Module) else owner
    return [method for method in FUSING_METHODS if callable(getattr(owner, method, None))]


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
