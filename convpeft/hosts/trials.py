"""Copies of modules to try things on, which leave nothing behind in what the user has."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from .records import ATTRIBUTE
from .slots import slots_of

Module = TypeVar("Module", bound=nn.Module)
_PLAIN = {str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device}  # what holds nothing


def deep_copy(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """Return a deep copy, also of a module that keeps tensors of autograd's graph, which ``copy.deepcopy`` refuses.

    ``weight_norm``, ``spectral_norm`` and ``prune`` of ``torch.nn.utils`` keep the weight of the last pass as a plain
    attribute and compute it anew before each pass; others keep feature maps in lists, dicts or objects of their own. The
    copy starts with their values, outside the graph. Its tensors are normal ones, also inside ``torch.inference_mode``. A
    part of an adapted model is copied without the records of the model.

    Args:
        module: stays as it is.
        memo: of ``copy.deepcopy``: what each object became, by ``id``.
    """
    memo = {} if memo is None else memo
    with torch.inference_mode(False):
        parts = list(module.modules())
        memo.update(dict.fromkeys(_records_elsewhere(parts)))
        memo.update(_empty_twins(parts))
        for tensor in _graph_tensors([part.__dict__ for part in parts], memo):
            memo[id(tensor)] = tensor.detach().clone()
        start = dict(memo)
        try:
            return copy.deepcopy(module, memo)
        except Exception:  # a hook may belong to a trainer, with files and locks, that no copy can be made of
            shared = [hook for part in module.modules() for hooks in _hooks(part) for hook in hooks.values()]
            if not shared:
                raise
            memo.clear()
            memo.update({**start, **{id(hook): hook for hook in shared}})
            return copy.deepcopy(module, memo)


def _empty_twins(parts: Sequence[nn.Module]) -> dict[int, Any]:
    """Return for each empty dict that a module has (ten kinds of hooks, mostly) a new one: most of a copy's time otherwise."""
    return {
        id(value): OrderedDict() if type(value) is OrderedDict else {}
        for part in parts
        for value in part.__dict__.values()
        if type(value) in (dict, OrderedDict) and not value
    }


def _records_elsewhere(parts: Sequence[nn.Module]) -> set[int]:
    """Return the ``id`` of records that modules refer to and that belong to a model around them."""
    known = {id(slots.state) for part in parts if (slots := slots_of(part)) is not None and slots.state is not None}
    return known - {id(part.__dict__.get(ATTRIBUTE)) for part in parts}


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [value for name, value in module.__dict__.items() if name.endswith("_hooks") and isinstance(value, dict)]


def _graph_tensors(values: list[Any], copied: Container[int] = ()) -> Iterator[Tensor]:
    """Yield the tensors of autograd's graph in values, in containers and objects in them, and so on.

    Args:
        values: to look through.
        copied: the ``id`` of what is not looked through.
    """
    waiting, seen = list(values), set(map(id, values))
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
            continue
        for part in _parts(value):
            if type(part) not in _PLAIN and id(part) not in seen and id(part) not in copied:
                seen.add(id(part))
                waiting.append(part)


def _parts(value: Any) -> Iterable[Any]:
    """Return what ``copy.deepcopy`` would go on to copy from a value."""
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        inside: list[Any] = list(value)
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inside = [value.__self__]
    elif isinstance(value, (type, FunctionType, ModuleType)):
        return []
    else:
        inside = [getattr(value, name) for name in _slot_names(type(value)) if hasattr(value, name)]
    held = getattr(value, "__dict__", None)
    return [*inside, *dict.values(held)] if isinstance(held, dict) else inside


def _slot_names(owner: type) -> list[str]:
    found = [vars(each).get("__slots__", ()) for each in owner.__mro__]
    return [name for names in found for name in ([names] if isinstance(names, str) else names) if name[:2] != "__"]


def private_copy(module: Module) -> Module:
    """Return a deep copy to try things on: what its hooks write to is copied as well, so the user's own see nothing.

    ``copy.deepcopy`` shares functions, and a hook that appends to a list, or counts, would do so for our inputs. The hooks
    still run, since one may change what a module computes. One that keeps what cannot be copied is left out.
    """
    memo: dict[int, Any] = {}
    copied = deep_copy(module, memo)
    for part in copied.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                own = _private(hook, memo)
                if own is None:
                    del hooks[key]
                else:
                    hooks[key] = own
    return copied


def _private(hook: Any, memo: dict[int, Any]) -> Any:
    """Return a hook that writes to copies of what the hook writes to; None where that cannot be copied."""
    try:
        if isinstance(hook, partial):
            return partial(_state(hook.func, memo), *hook.args, **hook.keywords)
        if not isinstance(hook, FunctionType) and memo.get(id(hook)) is hook:  # not copied with the module
            return copy.deepcopy(hook)
        return _state(hook, memo) if isinstance(hook, FunctionType) else hook
    except Exception:  # whatever the user's objects raise when they are copied
        return None


def _state(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of what a function holds; a module is the copy that there is of it, or itself."""
    if isinstance(value, FunctionType):
        return _twin(value, memo)
    if isinstance(value, (nn.Module, type, ModuleType)):
        return memo.get(id(value), value)
    for tensor in _graph_tensors([value]):
        memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(value, memo)


def _twin(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """Return a function that works on copies of what it holds, and of the globals that it names.

    Args:
        function: of the user's; torch's and our own hold nothing.
        memo: of ``copy.deepcopy``; functions of one module share the copy of its globals.
    """
    if str(function.__module__).partition(".")[0] in ("torch", __name__.partition(".")[0]):
        return function
    own = memo.get(id(function))
    if isinstance(own, FunctionType) and own is not function:
        return own
    names: dict[str, Any] = memo.setdefault(id(function.__globals__), _Globals(function.__globals__))
    cells = tuple(CellType() for _ in function.__closure__ or ())
    twin = FunctionType(function.__code__, names, function.__name__, None, cells or None)
    memo[id(function)] = twin
    for name in sorted(_named(function.__code__) & names.keys() - names.copied):  # type: ignore[attr-defined]
        names.copied.add(name)  # type: ignore[attr-defined]
        names[name] = _state(names[name], memo)
    for cell, original in zip(cells, function.__closure__ or (), strict=True):
        cell.cell_contents = _state(original.cell_contents, memo)
    twin.__defaults__, twin.__kwdefaults__ = _state(function.__defaults__, memo), _state(function.__kwdefaults__, memo)
    return twin


class _Globals(dict[str, Any]):
    """A copy of a module's globals, and the names of those that were copied in turn."""

    def __init__(self, original: dict[str, Any]) -> None:
        super().__init__(original)
        self.copied: set[str] = set()


def _named(code: CodeType) -> set[str]:
    """Return the names of globals and attributes in a function, and in the functions in it."""
    return set(code.co_names).union(*(_named(each) for each in code.co_consts if isinstance(each, CodeType)))


@contextmanager
def unobserved() -> Iterator[None]:
    """Leave out the hooks that the user registered for all modules, inside the context: what runs in it is not his."""
    kept = [
        (hooks, dict(hooks)) for hooks in (global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks)
    ]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in kept:
            hooks.update(content)


def exact_copies(modules: Sequence[Any]) -> list[Any]:
    """Return private copies in float64 on the CPU and in eval mode; their hooks stay, for a hook may change what they compute."""
    return [private_copy(module).to(device="cpu", dtype=torch.float64).eval() for module in modules]


def set_requires_grad(parameter: Tensor, flag: bool) -> None:
    """Set whether a tensor requires a gradient, in place, also of one that was made in ``torch.inference_mode``."""
    if parameter.requires_grad != flag:
        with torch.inference_mode(parameter.is_inference()):
            parameter.requires_grad_(flag)
