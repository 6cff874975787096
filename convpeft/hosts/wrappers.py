"""Wrappers around a model or a part of it (DDP, DataParallel, ``torch.compile``): looked through, or refused in words."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import HostError
from .slots import base_class

_INSIDE = ("module", "_orig_mod")  # the names of the child that a wrapper calls
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def _wrapper_classes() -> tuple[type[nn.Module], ...]:
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    plain = (DistributedDataParallel, nn.DataParallel)
    return plain if compiled is None else (*plain, compiled)


def inside(module: nn.Module) -> nn.Module:
    """Return the module that a wrapper calls, behind any number of wrappers; a module that is none is returned itself."""
    while isinstance(module, _wrapper_classes()):
        held = module._modules.get("_orig_mod", module._modules.get("module"))
        if held is None:
            break
        module = held
    return module


def named_inside(named: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Return named modules without the wrappers among them; what a wrapper calls has the wrapper's name.

    Names that torch gives contain ``module`` or ``_orig_mod`` for each wrapper, which the bare model does not have.
    """
    classes = _wrapper_classes()
    hidden = {
        f"{name}.{key}" if name else key
        for name, module in named
        if isinstance(module, classes)
        for key in _INSIDE
        if module._modules.get(key) is not None
    }
    if not hidden:
        return named
    return [(_without(name, hidden), module) for name, module in named if inside(module) is module]


def _without(name: str, hidden: set[str]) -> str:
    """Return a module's name without the parts that lead from a wrapper to what it calls."""
    parts = name.split(".")
    return ".".join(part for end, part in enumerate(parts, 1) if ".".join(parts[:end]) not in hidden)


def bare(pattern: str) -> str:
    """Return a pattern without parts that only a wrapper's names have.

    Example:
        >>> bare("_orig_mod.neck.**"), bare("features.module.0")
        ('neck.**', 'features.0')
    """
    return ".".join(part for part in pattern.split(".") if part not in _INSIDE)


def refuse_parallel(root: nn.Module) -> None:
    """Raise if adapters that are put into ``root`` now would not be synchronised between processes.

    DDP and FSDP take stock of the parameters when they wrap a model; what comes later would train in each process by
    itself. Outside of ``torch.distributed`` nothing is looked at.

    Raises:
        HostError: if a DDP object holds ``root``, a part of it or a model around it, or FSDP shards some of it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    mine = {id(module) for module in root.modules()}
    sharded = next((name for module in root.modules() for name in _sharded_by(type(module))), None)
    what = sharded or ("DistributedDataParallel" if _held_by_ddp(mine) else None)
    if what is not None:
        raise HostError(
            f"this {base_class(root).__name__} is wrapped in {what} already, which would not synchronise the gradients of "
            "adapters that come later: each process would train its own. Put them into the bare model first and wrap it "
            "then (for another adapter: drop the wrapper, inject or load, wrap again); the model is unchanged."
        )


def _sharded_by(kind: type) -> Iterator[str]:
    return (
        base.__name__
        for base in kind.__mro__
        if base.__name__ in _SHARDED and base.__module__.startswith("torch.distributed")
    )


def _held_by_ddp(mine: set[int]) -> bool:
    """Return whether a DDP object shares a module with those of the given ids; one that nobody uses does not count."""
    if not any(_shares(each, mine) for each in _ddp_objects()):
        return False
    gc.collect()
    return any(_shares(each, mine) for each in _ddp_objects())


def _ddp_objects() -> Iterable[Any]:
    return [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]


def _shares(wrapper: Any, mine: set[int]) -> bool:
    held = wrapper.__dict__.get("_modules", {}).get("module")  # a half-made object has none
    return held is not None and any(id(module) in mine for module in held.modules())
