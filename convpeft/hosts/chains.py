"""The plain chains that a factored merge leaves: a child beside or after a layer, added by a forward hook.

The layer stays of its own class and the chains are ordinary ``Sequential``s of ``Conv2d`` or ``Linear``, so a merged
model pickles, copies, compiles and exports like any other; it needs convpeft only for the hooks of this module. The
child gets a name that nothing of the layer has and no code of the model mentions, and the hook remembers it.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import HostError
from .callers import is_foreign
from .forward import add_to_entry
from .slots import Entry, base_class

BESIDE, AFTER = "beside", "after"  # the child's name where it is free; always so in models that earlier versions merged
_FUSED = (
    "another {what} for this {name}, as if it was fused with a norm after a factored merge: the chain that the merge left "
    "here would stay at the wrong scale. Merge with convpeft.merge(model, form='single') before fuse(), or fuse with "
    "convpeft.integrations (ultralytics.fuse, mmcv.fuse_conv_bn); to change the numbers alone, write into its data. It is "
    "unchanged."
)


class Chains(NamedTuple):
    """The chains of one layer: the name of the child that holds them, the child, and whether they read the layer's input."""

    child: str
    held: nn.ModuleList
    beside: bool


def chains_of(module: nn.Module) -> list[Chains]:
    """Return the chains that factored merges left at a module, in the order in which they are added."""
    found: list[Chains] = []
    for hook in module._forward_hooks.values():
        function, child = (hook.func, hook.keywords.get("child")) if isinstance(hook, partial) else (hook, None)
        if function is add_beside or function is add_after:
            beside = function is add_beside
            name = child or (BESIDE if beside else AFTER)
            found.append(Chains(name, module._modules[name], beside))  # type: ignore[arg-type]
    return found


def carries_chains(module: nn.Module) -> bool:
    """Return whether an earlier factored merge left chains here."""
    return bool(module._forward_hooks) and bool(chains_of(module))


def beside(module: nn.Module) -> Chains | None:
    """Return the chains that run beside a layer, or None."""
    return next((chains for chains in chains_of(module) if chains.beside), None)


def attach_chains(
    layer: nn.Module,
    chains: Sequence[nn.Sequential],
    *,
    beside: bool,
    entry: Entry = None,
    taken: Set[str] = frozenset(),
) -> None:
    """Add chains to a layer, in place.

    Args:
        layer: keeps its class and its weight.
        chains: plain layers, run one after the other.
        beside: the chains read the layer's input, and the first of them has taken over the layer's bias; else they
            read its output.
        entry: the entry of a tuple, list or dict output that the chains read and add to.
        taken: names that the chains' child may not have, besides those that the layer has.
    """
    target: Any = layer
    parts: Any = nn.ModuleList(chains).train(layer.training)
    for earlier in chains_of(layer):
        if beside and earlier.beside:  # of an earlier merge, hook and all
            earlier.held.extend(parts)
            return
    name = _free_name(layer, BESIDE if beside else AFTER, taken)
    if beside:
        target.bias = None
        layer.register_forward_hook(partial(add_beside, child=name), with_kwargs=True, prepend=True)
    else:
        parts.entry = entry
        layer.register_forward_hook(partial(add_after, child=name), prepend=True)
    layer._modules[name] = parts  # what a class does when a child is set is not for this one


def _free_name(module: nn.Module, wanted: str, taken: Set[str]) -> str:
    """Return a name that no child, tensor, attribute or method of a module has: the wanted one, or one like it."""
    taken = {*taken, *module._modules, *module._parameters, *module._buffers, *module.__dict__, *dir(type(module))}
    number, name = 1, wanted
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def guard_chains(layer: nn.Module, guarded: bool = True) -> None:
    """Let a layer refuse, or take again, a parameter that fusing a norm into it would set, in place."""
    held = layer.__dict__.get("register_parameter")
    if guarded and carries_chains(layer) and held is None:
        layer.__dict__["register_parameter"] = partial(_register, layer)
    elif not guarded and isinstance(held, partial) and held.func is _register:
        del layer.__dict__["register_parameter"]


def set_bias(layer: Any, bias: nn.Parameter) -> None:
    """Give a merged layer its bias in place; one with chains beside it keeps the bias in the first of them."""
    chains = beside(layer)
    if chains is None:
        layer.bias = bias
        return
    last: Any = chains.held[0][-1]  # type: ignore[index]
    whole = bias if last.bias is None else nn.Parameter(bias + last.bias, requires_grad=bias.requires_grad)
    last.bias = nn.Parameter(whole.detach(), requires_grad=bias.requires_grad)


def add_beside(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, child: str = BESIDE
) -> Tensor:
    """Forward hook of a layer merged as ``factored``: add the plain chains, run on the layer's input.

    Raises:
        HostError: if the layer was fused with a norm after the merge (it has a bias, which went into the chain), for
            that would leave the chains unscaled.
    """
    chains: Any = module._modules[child]
    if module.bias is not None:
        raise HostError(
            f"this {base_class(module).__name__} was fused with a norm after a factored merge, which left its "
            "chain behind. Merge with convpeft.merge(model, form='single') before fuse(), or do not fuse."
        )
    x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
    for chain in chains:
        output = output + chain(x)
    return output


def add_after(module: nn.Module, args: tuple[Any, ...], output: Any, child: str = AFTER) -> Any:
    """Forward hook of a module whose output adapters were merged: add the plain chains, run on the output."""
    chains: Any = module._modules[child]
    changed = output
    for chain in chains:
        changed = add_to_entry(output, changed, chains.entry, chain)
    return changed


def _register(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Register a parameter of a layer with chains, but refuse what fusing a norm into it would leave.

    Raises:
        HostError: then; nothing was changed.
    """
    changed = name in ("weight", "bias") and param is not layer._parameters.get(name, layer)
    if changed and is_foreign() and carries_chains(layer):
        raise HostError(_FUSED.format(what=name, name=base_class(layer).__name__))
    type(layer).register_parameter(layer, name, param)


def _refuse(owner: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a fusing method, in models that earlier versions merged and pickled."""
    raise HostError(
        f"{owner}.{method}() rewrites layers by their weights alone and would pass by the chains that a factored merge "
        "left. Merge with convpeft.merge(model, form='single') instead, or, for an ultralytics model, call "
        "convpeft.integrations.ultralytics.fuse(model); the model is unchanged."
    )
