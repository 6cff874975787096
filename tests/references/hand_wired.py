"""What the user's hand-wired code did, as they describe it: each function shows one fault that convpeft must not have."""

from __future__ import annotations

import math

from torch import Tensor, nn


def merge_weights(adapter: nn.Module) -> Tensor:
    """Return the 1x1 kernel their merge of a Rep-MoNA kept: up times down and the mean of the scales, no branches."""
    up, down = adapter.up.detach().flatten(1), adapter.down.detach().flatten(1)
    return (up @ down * adapter.scale.detach().mean())[:, :, None, None]


def guess_channels(block: nn.Module) -> int | None:
    """Return the output channels of a block by its last convolution's name, or None, which meant: no adapter."""
    conv = getattr(block, "final_conv", None)
    return conv.out_channels if conv is not None else None


def freeze(model: nn.Module) -> None:
    """Freeze by a word in the parameter's name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name)


def cosine(step: int, steps: int) -> float:
    """Return the factor of their learning rate: a cosine about zero, with no floor."""
    return math.cos(math.pi * step / steps)
