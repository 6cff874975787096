"""ultralytics: fuse the norms of a merged model into its convolutions, chains of a factored merge included.

ultralytics is licensed AGPL-3.0. ``fuse`` does not import it: its blocks are known by their parts. ``from_config`` does, when
it is called.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HostError, OptionError
from ..hosts.chains import carries_chains, chains_of
from ..hosts.modules import base_class
from ..hosts.slots import slots_of
from ..hosts.transactions import protect, unwatch
from .folding import fold, may_fold


def from_config(config: str, **arguments: Any) -> nn.Module:
    """Return a model of ultralytics built from one of its configurations, without weights; this imports ultralytics.

    Args:
        config: ``yolov8n.yaml`` or another; a file of weights is refused, since ultralytics would unpickle or download it.
        arguments: of ultralytics' ``YOLO``.

    Raises:
        OptionError: if it is no configuration.
    """
    if not config.endswith((".yaml", ".yml")):
        raise OptionError(
            f"{config!r} is no configuration of ultralytics: give one that ends in .yaml, such as yolov8n.yaml"
        )
    from ultralytics import YOLO

    model: Any = YOLO(config, **arguments).model
    return model  # type: ignore[no-any-return]


def fuse(model: nn.Module) -> nn.Module:
    """Fuse the norms of a merged ultralytics model into its convolutions, in place, and return it.

    ``model.fuse()`` folds each block's BatchNorm into the block's convolution. Where ``convpeft.merge`` left a chain
    beside that convolution, the norm scales the chain too, so it goes into both here: every chain's last step is scaled
    by the norm's gain, the first chain takes the norm's shift. The rest is ultralytics' own. A copy is fused first; if
    anything there touches a layer that carries a chain in another way, the model is refused.

    Args:
        model: as ``convpeft.merge`` returned it, in any form (or one that convpeft never saw).

    Raises:
        HostError: if the model is still adapted, has no ``fuse``, or fusing it would pass a chain by; the text names the
            layers, and the model is unchanged.
    """
    if any(slots_of(module) is not None for module in model.modules()):
        raise HostError(
            f"this {base_class(model).__name__} still carries adapters, which fusing would lose. Call "
            "convpeft.merge(model) first and fuse what it returns; the model is unchanged."
        )
    if not callable(getattr(type(model), "fuse", None)):
        raise HostError(
            f"{type(model).__name__} has no fuse(): this is for ultralytics' models; the model is unchanged."
        )
    try:
        lost = _fuse(copy.deepcopy(model))
    except Exception as error:  # ultralytics' own code on a layer it does not expect
        raise HostError(_refusal(model, f"its own fuse() fails ({type(error).__name__}: {error})")) from error
    if lost:
        raise HostError(_refusal(model, f"fusing would pass by the chains of a factored merge at {', '.join(lost)}"))
    _fuse(model)
    return model


def _fuse(model: Any) -> list[str]:
    """Fuse in place, and return the names of layers with chains that were rewritten or replaced by ultralytics."""
    unwatch(model)
    for block in list(model.modules()):
        if _folds_beside(block):
            _fold(block)
    before = {name: _tensors(module) for name, module in model.named_modules() if carries_chains(module)}
    model.fuse(verbose=False)
    protect(model)
    modules = dict(model.named_modules())
    return [name for name, tensors in before.items() if not _is_kept(modules.get(name), tensors)]


def _folds_beside(block: Any) -> bool:
    """Return whether a block is ultralytics' convolution, norm, activation, with chains beside its convolution only."""
    conv, norm = block._modules.get("conv"), block._modules.get("bn")
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    plain = callable(getattr(block, "forward_fuse", None)) and not hasattr(block, "fuse_convs")
    return plain and carries_chains(conv) and conv.bias is None and may_fold(conv, norm)


def _fold(block: Any) -> None:
    """Fold a block's norm into its convolution and the chains beside it, in place, as the block's own fusing leaves it."""
    fold(block.conv, block.bn)
    block.conv.requires_grad_(False)
    del block.bn
    block.forward = block.forward_fuse


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a layer's own tensors and of its chains."""
    chains = [chains.held for chains in chains_of(module)]
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for number, chain in enumerate(chains):
        held.update({f"{number}.{key}": tensor for key, tensor in chain.state_dict().items()})
    return {key: tensor.detach().clone() for key, tensor in held.items()}


def _is_kept(module: nn.Module | None, tensors: dict[str, Tensor]) -> bool:
    if module is None or not carries_chains(module):
        return False
    now = _tensors(module)
    return now.keys() == tensors.keys() and all(torch.equal(now[key], tensors[key]) for key in tensors)


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"this {type(model).__name__} cannot be fused: {why}. Merge with convpeft.merge(model, form='single'), put the "
        "adapters beside those layers instead of on their outputs, or do not fuse; the model is unchanged."
    )
