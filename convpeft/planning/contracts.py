"""What a module says of its output's channels without being run: only classes whose forward is known are believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..hosts.modules import base_class, is_sequence


@dataclass(frozen=True)
class OutputShape:
    """The channels of a module's output: how many, and whether they are the last axis (else that of an image)."""

    channels: int
    channels_last: bool


# the class whose forward a module has -> where it says the number of channels, and whether they are the last axis
_CONTRACTS: dict[type[nn.Module], tuple[str, bool]] = {
    nn.Conv2d: ("out_channels", False),
    nn.ConvTranspose2d: ("out_channels", False),
    nn.BatchNorm2d: ("num_features", False),
    nn.InstanceNorm2d: ("num_features", False),
    nn.Linear: ("out_features", True),
}
_KEEPS_CHANNELS = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.GroupNorm)


def contract(module: nn.Module) -> OutputShape | None:
    """Return the output's channels of a layer whose forward is torch's own, where the class fixes their axis; else None."""
    forward = _forward(module)
    for kind, (attribute, last) in _CONTRACTS.items():
        if isinstance(module, kind) and forward is kind.forward:
            return OutputShape(int(getattr(module, attribute)), last)
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1:
        return OutputShape(module.normalized_shape[0], True)
    return None


def declared(module: nn.Module) -> OutputShape | None:
    """Return what a layer of a class that may have its own forward would have by its attributes; else None."""
    for kind, (attribute, last) in {**_CONTRACTS, nn.GroupNorm: ("num_channels", False)}.items():
        if isinstance(module, kind):
            return OutputShape(int(getattr(module, attribute)), last)
    return None


def last_step(module: Any) -> nn.Module:
    """Return the step of a Sequential, of its last step, and so on, that decides on the channels; else the module itself.

    Steps that keep the channels where they are come after it: activations, dropout, a GroupNorm.
    """
    while is_sequence(module) and _forward(module) is nn.Sequential.forward:
        deciding = next((step for step in reversed(list(module)) if not _keeps_channels(step)), None)
        if deciding is None:
            return module  # type: ignore[no-any-return]
        module = deciding
    return module  # type: ignore[no-any-return]


def _forward(module: nn.Module) -> Any:
    """Return the function that runs when a module is called."""
    return module.__dict__.get("forward", getattr(base_class(module), "forward", None))


def _keeps_channels(module: nn.Module) -> bool:
    kind = base_class(module)
    if "forward" in module.__dict__ or kind in (nn.GLU, nn.MultiheadAttention):  # they live among the activations
        return False
    return kind in _KEEPS_CHANNELS or kind.__module__ == "torch.nn.modules.activation"
