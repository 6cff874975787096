"""Whether a model's modules can still be given other tensors, or their own classes back: asked before anything is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from torch import nn

from . import hosting
from .errors import HostError, StateError, shortened
from .guards import restored_class
from .state import module_at

_UNDO = "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations, remove_weight_norm)"


def check_exchange(root: nn.Module, owners: Mapping[str, str | None]) -> None:
    """Raise if the tensors of some module cannot be exchanged for those of its owner to be.

    Args:
        root: the adapted model.
        owners: by name of a swapped module, the owner whose values it is to show, None for the base's.

    Raises:
        StateError: if a tensor to be exchanged is no longer where it was, or FSDP2 holds it.
    """
    check_held(root, owners)
    exchanged = [name for name, owner in owners.items() if _exchanged(module_at(root, name), owner)]
    if exchanged and _is_sharded(root):
        raise StateError(
            f"this {hosting.base_class(root).__name__} is sharded by FSDP2, which puts back every tensor that it holds: the "
            f"unfrozen tensors of {shortened(exchanged)} cannot be exchanged. Switch before fully_shard, or save the adapter "
            "and switch in a model that is not sharded; the model is unchanged."
        )


def check_held(root: nn.Module, owners: Mapping[str, str | None]) -> None:
    """Raise if a tensor that showing the owners' values would exchange is no longer in its module.

    Raises:
        StateError: naming the first module and what it lost.
    """
    for name, owner in owners.items():
        module = module_at(root, name)
        names = _exchanged(module, owner)
        gone = [each for each in names if each not in module._parameters and each not in module._buffers]
        if gone:
            raise StateError(
                f"{name!r} has lost its {', '.join(gone)}: it was pruned, parametrised or weight-normed after inject(), and an "
                f"adapter that unfroze it has values of its own for that. Undo it first {_UNDO}; the model is unchanged."
            )


def check_classes(root: nn.Module, names: Iterable[str]) -> None:
    """Raise if some swapped module cannot get its own class back.

    Raises:
        HostError: if its class was extended, or its forward replaced, after ``inject`` by something that cannot be kept.
    """
    for name in names:
        module = module_at(root, name)
        slots = hosting.slots_of(module)
        try:
            restored_class(module, hosting.swapped_class(module))
            if "forward" in module.__dict__ and slots is not None and any(slots.adapters()):
                raise HostError(
                    "its forward was replaced on the object itself after inject() (by accelerate's hooks?), and would go on "
                    "asking for the adapter. Undo it first"
                )
        except HostError as error:
            raise HostError(f"{name or '(root)'}: {error}; the model is unchanged.") from None


def _exchanged(module: nn.Module, owner: str | None) -> list[str]:
    """Return the names of the tensors that showing ``owner``'s values would exchange."""
    slots = hosting.slots_of(module)
    if slots is None or slots.shown == owner:
        return []
    drawers = [slots.drawer(hosting.BASE if each == slots.shown else each) for each in (slots.shown, owner) if each]
    return list(dict.fromkeys(name for drawer in drawers for name in (*drawer._parameters, *drawer._buffers)))


def _is_sharded(root: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    return any(base.__name__ == "FSDPModule" for module in root.modules() for base in type(module).__mro__)
