"""What others do to an adapted module that would lose its adapter, or could not be undone: each is refused here.

Modules are known here by what convpeft gave them: the class attribute ``adapted_from``, and the child ``convpeft``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import HostError


def refusing(method: str) -> Any:
    """Return a method that refuses to fuse an adapted module, to stand for the ``method`` that would."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise HostError(
            f"{self.adapted_from.__name__}.{method}() would rewrite layers that carry adapters and lose them. "
            "Call convpeft.merge(model) first (or convpeft.eject(model) to drop them); the model is unchanged."
        )

    refuse.__name__ = method
    return refuse


def refuse_another_bias(module: Any, slots: Any) -> None:
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


def restored_class(module: nn.Module, swapped: type) -> Any:
    """Return the class a module has without our swap to ``swapped``; a parametrisation put on top of it since is kept.

    Raises:
        HostError: if something else extended the class (``fully_shard``, say).
    """
    now, base = type(module), swapped.adapted_from  # type: ignore[attr-defined]
    if now is swapped:
        return base
    if not is_parametrized(module) or now.__bases__ != (swapped,):
        raise HostError(
            f"its class was extended after inject(), to {now.__name__}, and convpeft cannot take itself out from under that. "
            "Undo it first. FSDP2's fully_shard cannot be undone: save the adapter, and load it into a model that is not sharded"
        )
    body = {key: value for key, value in vars(now).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), body)
