"""The plain chains that a factored merge leaves: children ``beside`` or ``after`` a layer, added by a forward hook.

The layer stays of its own class and the chains are ordinary ``Sequential``s of ``Conv2d`` or ``Linear``, so a merged
model pickles, copies, compiles and exports like any other; it needs convpeft only for the two hooks of this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import HostError
from .forward import add_to_entry
from .guards import FUSING_METHODS, fusing_methods
from .modules import is_within
from .slots import Entry, base_class

BESIDE, AFTER = "beside", "after"


def attach_chains(layer: nn.Module, chains: Sequence[nn.Sequential], *, beside: bool, entry: Entry = None) -> None:
    """Add chains to a layer, in place.

    Args:
        layer: keeps its class and its weight.
        chains: plain layers, run one after the other.
        beside: the chains read the layer's input, and the first of them has taken over the layer's bias; else they
            read its output.
        entry: the entry of a tuple, list or dict output that the chains read and add to.
    """
    target: Any = layer
    parts: Any = nn.ModuleList(chains).train(layer.training)
    if beside and isinstance(layer._modules.get(BESIDE), nn.ModuleList):  # of an earlier merge, hook and all
        target._modules[BESIDE].extend(parts)
        return
    target.add_module(BESIDE if beside else AFTER, parts)
    if beside:
        target.bias = None
        layer.register_forward_hook(add_beside, with_kwargs=True, prepend=True)
    else:
        parts.entry = entry
        layer.register_forward_hook(add_after, prepend=True)


def carries_chains(module: nn.Module) -> bool:
    """Return whether an earlier factored merge left chains here."""
    return any(hook in (add_beside, add_after) for hook in module._forward_hooks.values())


def set_bias(layer: Any, bias: nn.Parameter) -> None:
    """Give a merged layer its bias in place; one with chains beside it keeps the bias in the first of them."""
    if not carries_chains(layer) or BESIDE not in layer._modules:
        layer.bias = bias
        return
    last = layer._modules[BESIDE][0][-1]
    whole = bias if last.bias is None else nn.Parameter(bias + last.bias, requires_grad=bias.requires_grad)
    last.bias = nn.Parameter(whole.detach(), requires_grad=bias.requires_grad)


def add_beside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook of a layer merged as ``factored``: add the plain chains, run on the layer's input.

    Raises:
        HostError: if the layer was fused with a norm after the merge (it has a bias, which went into the chain), for
            that would leave the chains unscaled.
    """
    chains: Any = module._modules[BESIDE]
    if module.bias is not None:
        raise HostError(
            f"this {base_class(module).__name__} was fused with a norm after a factored merge, which left its "
            "chain behind. Merge with convpeft.merge(model, form='single') before fuse(), or do not fuse."
        )
    x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
    for chain in chains:
        output = output + chain(x)
    return output


def add_after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a module whose output adapters were merged: add the plain chains, run on the output."""
    chains: Any = module._modules[AFTER]
    changed = output
    for chain in chains:
        changed = add_to_entry(output, changed, chains.entry, chain)
    return changed


def refuse_fusing(model: nn.Module) -> None:
    """Let every module with chains in it refuse to be fused from now on, in place.

    Methods such as ultralytics' ``fuse`` rewrite or replace layers by what their weights say, and would pass the chains
    by, some of them without a sound.
    """
    names = [name for name, module in model.named_modules() if carries_chains(module)]
    for above, module in model.named_modules():
        if any(is_within(name, above) for name in names):
            for method in fusing_methods(type(module)):
                module.__dict__[method] = partial(_refuse, base_class(module).__name__, method)


def allow_fusing(model: nn.Module) -> None:
    """Undo ``refuse_fusing``, in place."""
    for module in model.modules():
        for method in FUSING_METHODS:
            entry = module.__dict__.get(method)
            if isinstance(entry, partial) and entry.func is _refuse:
                del module.__dict__[method]


def _refuse(owner: str, method: str, *args: Any, **kwargs: Any) -> Any:
    raise HostError(
        f"{owner}.{method}() rewrites layers by their weights alone and would pass by the chains that a factored merge "
        "left. Merge with convpeft.merge(model, form='single') instead, or, for an ultralytics model, call "
        "convpeft.integrations.ultralytics.fuse(model); the model is unchanged."
    )
