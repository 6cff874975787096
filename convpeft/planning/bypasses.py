"""Layers that are bypassed: their parent reads their weight instead of calling them, so an adapter there never runs.

The source of the forward passes tells (``forward_source``). What it does not show, ``convpeft.check`` finds by running.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..hosts.modules import base_class
from .forward_source import Condition, Path, Use, method_of, source_of

_NOT_A_CALL = {
    "_conv_forward", "parameters", "named_parameters", "buffers", "state_dict", "requires_grad_", "extra_repr",
}  # fmt: skip
_FAST_PATHS: dict[Any, dict[str, str]] = {  # at inference these read all of it, though elsewhere they call it
    nn.TransformerEncoderLayer: {
        **{child: f"{child}.weight" for child in ("linear1", "linear2", "norm1", "norm2")},
        "self_attn": "self_attn.in_proj_weight",
    },
    nn.MultiheadAttention: {"out_proj": "out_proj.weight"},
}


@dataclass(frozen=True)
class Reader:
    """A module whose forward pass reads a tensor of a module below it.

    Attributes:
        class_name: of the reading module.
        expression: what it reads, as ``qkv.weight``.
        certain: it does not call the module it reads from, so an adapter there would not run.
    """

    class_name: str
    expression: str
    certain: bool


def weight_readers(modules: Iterable[nn.Module]) -> dict[int, Reader]:
    """Return, by ``id``, the modules whose weight another of ``modules`` reads in its forward pass, and the reader.

    Biases do not count, since most adapters do not change them. A certain reader is preferred to an uncertain one.
    """
    found: dict[int, Reader] = {}
    for module in modules:
        if module._modules and "forward" not in module.__dict__:
            for key, reader in _readings(module):
                if key not in found or (reader.certain and not found[key].certain):
                    found[key] = reader
    return found


def bypassed(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Return, by ``id``, each module that would never call an adapter, since another of ``modules`` reads its weight, and why."""
    return {
        key: f"its parent {reader.class_name} reads {reader.expression} itself and would bypass the adapter; "
        "put the adapter on the parent's output instead"
        for key, reader in weight_readers(modules).items()
        if reader.certain
    }


def _readings(module: nn.Module) -> Iterator[tuple[int, Reader]]:
    base: Any = base_class(module)
    source = source_of(base)
    for parent, children in _FAST_PATHS.items():
        if parent.forward in source.functions:
            for child, expression in children.items():
                yield id(module._modules.get(child)), Reader(parent.__name__, expression, True)
    uses = [use for use in source.uses if all(_may_hold(module, condition) for condition in use.conditions)]
    found = [(use, *each) for use in uses if not use.describes for each in _resolved(module, use.path)]
    reads = [entry for entry in found if entry[1] is not module and _is_weight(entry[1], entry[2])]
    if reads:
        called = _called(module, uses)
        for use, target, rest in reads:
            path = use.path[: len(use.path) - len(rest) + 1]
            yield id(target), Reader(base.__name__, ".".join(part or "*" for part in path), id(target) not in called)


def _is_weight(module: nn.Module, rest: Path) -> bool:
    return len(rest) > 0 and rest[0] != "bias" and rest[0] in module._parameters


def _called(module: nn.Module, uses: Iterable[Use]) -> set[int]:
    """Return the modules below that a forward pass may call: those it names as a whole, and all that is in them."""
    called: set[int] = set()
    for use in uses:
        for target, rest in _resolved(module, use.path):
            if not rest or _may_call(target, rest[0], followed=target is module):
                called |= {id(below) for below in target.modules()}
    return called


def _may_call(module: nn.Module, name: str | None, *, followed: bool) -> bool:
    """Return whether an attribute may call what is below its module (``followed``: a method of a class has been read)."""
    if name is None or name in module._parameters or name in _NOT_A_CALL:
        return False
    value = module.__dict__.get(name)
    held = list(value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    if callable(value) or any(callable(each) for each in held):
        return True
    base = base_class(module)
    if isinstance(inspect.getattr_static(base, name, None), (staticmethod, classmethod)):
        return False
    return callable(getattr(base, name, None)) and not (followed and method_of(base, name)[1])


def _may_hold(module: nn.Module, condition: Condition) -> bool:
    """Return whether a condition holds for a module, as far as a look at the attribute tells."""
    value = getattr(module, condition.attribute, ...) if condition.attribute != "training" else ...
    if value is ... or (not condition.about_none and not isinstance(value, (bool, int, str, type(None)))):
        return True
    return (value is None if condition.about_none else bool(value)) == condition.wanted


def _resolved(module: nn.Module, path: Path) -> list[tuple[nn.Module, Path]]:
    """Return the modules a path leads to, each with the parts of the path that are no module."""
    if not path:
        return [(module, path)]
    head, rest = path[0], path[1:]
    children = {name: child for name, child in module._modules.items() if child is not None}
    if head is None:
        return [found for child in children.values() for found in _resolved(child, rest)] or [(module, path)]
    if head.startswith("-") and head[1:].isdigit() and int(head[1:]) <= len(children):
        return _resolved(list(children.values())[int(head)], rest)
    return _resolved(children[head], rest) if head in children else [(module, path)]
