"""Which methods of a class may rewrite layers, as their byte code says: they set, delete or replace children or weights.

Only a first sieve: what such a method does is watched when it is called (``transactions``), and most do no harm.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence, Set
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from .guards import FUSING_METHODS
from .modules import base_class

_SETTING = {
    "setattr", "delattr", "__setattr__", "__delattr__", "__setitem__", "__delitem__", "add_module", "register_module", "register_parameter",
    "set_submodule", "_modules", "_parameters",
}  # fmt: skip
_TENSORS = {"weight", "bias", "data", "forward"}
_STORE, _DELETE, _EXTENDED = (dis.opmap[name] for name in ("STORE_ATTR", "DELETE_ATTR", "EXTENDED_ARG"))
_DEEP = 3  # functions that call functions


class _Facts(NamedTuple):
    """What a function's byte code says: the attributes that it sets, whether it deletes any, all names, and all texts."""

    sets: frozenset[str]
    deletes: bool
    names: frozenset[str]
    texts: frozenset[str]


def rewriting_methods(modules: Sequence[nn.Module], below: Set[str]) -> list[set[str]]:
    """Return, for each module, the names of its own methods that may rewrite layers, or that call such methods by name.

    Those that a forward pass calls are left out, for they run in every step; those of torch's own classes as well.

    Args:
        modules: whose classes are read, each behind those above it.
        below: the names that children have, anywhere in the model.
    """
    owners: list[Any] = [base_class(module) for module in modules]
    in_forward = frozenset().union(*(_named_in_forward(owner) for owner in owners))
    found: dict[Any, set[str]] = {}
    for owner in owners:
        if owner not in found:
            methods = _methods(owner)
            found[owner] = {
                name
                for name, each in methods.items()
                if name not in in_forward and (name in FUSING_METHODS or _rewrites(each) or _sets(each) & below)
            }
    _add_callers(found, in_forward)
    return [found[owner] for owner in owners]


def _add_callers(found: dict[Any, set[str]], in_forward: Set[str]) -> None:
    """Add, in place, the methods that call one of those found by name, and those that call these."""
    named: set[str] = set()
    while named != (all_named := set().union(*found.values())):
        named = all_named
        for owner, names in found.items():
            for name, function in _methods(owner).items():
                if name not in in_forward and _facts(function).names & named:
                    names.add(name)


def mentioned(root: nn.Module) -> set[str]:
    """Return every name that the classes of a model mention in their code, as a name or as a text; torch's own are not read."""
    owners = {each for module in root.modules() for each in base_class(module).__mro__}
    return set().union(*(_mentioned_by(owner) for owner in owners))


@cache
def _mentioned_by(owner: Any) -> frozenset[str]:
    if owner is object or owner.__module__.startswith("torch.nn."):
        return frozenset()
    found: set[str] = set(vars(owner))
    for value in vars(owner).values():
        for each in (value, *(getattr(value, part, None) for part in ("fget", "fset", "__func__", "func"))):
            if isinstance(each, FunctionType):
                facts = _facts(each)
                found |= facts.names | facts.texts
    return frozenset(found)


@cache
def _methods(owner: Any) -> dict[str, FunctionType]:
    """Return the plain methods that a class has from outside of torch, by name."""
    found: dict[str, FunctionType] = {}
    for each in owner.__mro__:
        if each.__module__.startswith("torch.nn.") or each in (nn.Module, object):
            continue
        for name, function in vars(each).items():
            if isinstance(function, FunctionType) and not (name.startswith("__") and name.endswith("__")):
                found.setdefault(name, function)
    return found


@cache
def _named_in_forward(owner: Any) -> frozenset[str]:
    """Return all names in a class's forward pass and in the methods of its own that it calls, directly or not."""
    methods = _methods(owner)
    waiting, reached, named = ["forward"], {"forward"}, {"forward"}
    while waiting:
        function = methods.get(waiting.pop())
        names = frozenset() if function is None else _facts(function).names
        named |= names
        more = {name for name in names if name in methods} - reached
        reached |= more
        waiting += more
    return frozenset(named)


@cache
def _rewrites(function: FunctionType) -> bool:
    """Return whether a function, or one of its own module that it calls by name, deletes attributes or sets weights."""
    return any(
        facts.deletes or facts.names & _SETTING or facts.sets & _TENSORS for facts in _with_helpers(function, _DEEP)
    )


@cache
def _sets(function: FunctionType) -> frozenset[str]:
    """Return the attributes that a function, or one of its own module that it calls by name, sets."""
    return frozenset().union(*(facts.sets for facts in _with_helpers(function, _DEEP)))


def _with_helpers(function: FunctionType, depth: int) -> Iterator[_Facts]:
    facts = _facts(function)
    yield facts
    if depth:
        for name in facts.names:
            helper = function.__globals__.get(name)
            if isinstance(helper, FunctionType) and not helper.__module__.startswith("torch."):
                yield from _with_helpers(helper, depth - 1)


@cache
def _facts(function: FunctionType) -> _Facts:
    return _read(function.__code__)


def _read(code: CodeType) -> _Facts:
    sets: set[str] = set()
    names = set(code.co_names)
    raw, extended, deletes = code.co_code, 0, False
    if _STORE in raw[::2] or _DELETE in raw[::2]:
        for operation, argument in zip(raw[::2], raw[1::2], strict=True):
            extended = (extended << 8) | argument
            if operation == _EXTENDED:
                continue
            deletes = deletes or operation == _DELETE
            if operation == _STORE and extended < len(code.co_names):
                sets.add(code.co_names[extended])
            extended = 0
    texts = {each for const in code.co_consts for each in _flat(const) if isinstance(each, str)}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _read(inner)
            sets, deletes, names, texts = (
                sets | more.sets,
                deletes or more.deletes,
                names | more.names,
                texts | more.texts,
            )
    return _Facts(frozenset(sets), deletes, frozenset(names), frozenset(texts))


def _flat(const: Any) -> tuple[Any, ...]:
    """Return the constants in a constant."""
    return tuple(const) if isinstance(const, (tuple, frozenset)) else (const,)
