"""mmcv: fuse the norms of a merged model into its convolutions, chains of a factored merge included.

mmcv is not imported here: like its own ``fuse_conv_bn``, this goes by the order of the children.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..errors import HostError, shortened
from ..hosts.chains import carries_chains, chains_of
from ..hosts.modules import base_class
from ..hosts.slots import slots_of
from ..hosts.snapshot import Snapshot
from ..hosts.transactions import protect
from .folding import fold, may_fold


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fuse each BatchNorm of a merged mmcv-style model into the convolution before it, in place, and return the model.

    A norm is fused into the convolution that is the child before it, and an ``nn.Identity`` takes its place, as mmcv's
    ``fuse_conv_bn`` has it. Where ``convpeft.merge`` left a chain beside that convolution, the norm scales the chain too. A
    convolution whose class has a forward of its own (standardised weights, say) keeps its norm, and so does one that is
    used under several names, or in a block that runs the norm first.

    Args:
        model: as ``convpeft.merge`` returned it, in any form (or one that convpeft never saw), in mmcv's layout.

    Raises:
        HostError: if the model is still adapted, or a chain lies between a convolution and its norm, or on that norm; the
            text names the layers, and the model is unchanged.
    """
    if any(slots_of(module) is not None for module in model.modules()):
        raise HostError(
            f"this {base_class(model).__name__} still carries adapters, which fusing would lose. Call "
            "convpeft.merge(model) first and fuse what it returns; the model is unchanged."
        )
    pairs = _pairs(model)
    between = [name for name, (_, conv, norm, _) in pairs.items() if not _is_clear(conv, norm)]
    if between:
        raise HostError(
            f"this {base_class(model).__name__} cannot be fused: fusing would pass by the chains of a factored merge at "
            f"{shortened(between)}. Merge with convpeft.merge(model, form='single'), put the adapters beside those layers "
            "instead of on their outputs, or do not fuse; the model is unchanged."
        )
    before = Snapshot(model)
    try:
        for parent, conv, norm, key in pairs.values():
            fold(conv, norm)
            parent.add_module(key, nn.Identity().train(norm.training))
    except BaseException:
        before.restore()
        raise
    protect(model)
    return model


def _is_clear(conv: nn.Module, norm: nn.Module) -> bool:
    """Return whether no chain reads what lies between a convolution and its norm, or what the norm gives."""
    return not carries_chains(norm) and all(chains.beside for chains in chains_of(conv))


def _pairs(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Conv2d, nn.Module, str]]:
    """Return, by the convolution's name, each pair to fuse: the parent, the convolution, the norm, and the norm's key."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[nn.Module, nn.Conv2d, nn.Module, str]] = {}
    for name, parent in model.named_modules():
        if isinstance(parent, nn.Conv2d) or _runs_norm_first(parent):
            continue
        ours = {chains.child for chains in chains_of(parent)}
        last: tuple[str, nn.Conv2d] | None = None
        for key, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                if last is not None and _may_pair(last[1], child, uses):
                    found[f"{name}.{last[0]}".lstrip(".")] = (parent, last[1], child, key)
                last = None
            elif isinstance(child, nn.Conv2d) and key not in ours:
                last = key, child
    return found


def _may_pair(conv: nn.Conv2d, norm: nn.Module, uses: Counter[int]) -> bool:
    """Return whether a norm may go into a convolution: both used once, and the convolution no more than one."""
    base: Any = base_class(conv)
    plain = base.forward is nn.Conv2d.forward and base._conv_forward is nn.Conv2d._conv_forward
    once = uses[id(conv)] == uses[id(norm)] == 1
    return plain and once and (may_fold(conv, norm) or not _is_clear(conv, norm))


def _runs_norm_first(block: nn.Module) -> bool:
    """Return whether a block, such as mmcv's ``ConvModule``, says an order in which the norm does not follow the convolution."""
    order = block.__dict__.get("order")
    if not isinstance(order, (tuple, list)) or "conv" not in order or "norm" not in order:
        return False
    return list(order).index("norm") != list(order).index("conv") + 1
