"""Whether a chain can be put at a module: the module must run it as nothing but the chain that it is."""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch import nn

from ..hosts.modules import base_class, is_sequence
from ..planning.forward_source import source_of

_WALKING = {"children", "named_children", "modules", "named_modules", "_modules"}
_INSTEAD = "put the adapter on the output of its last layer, or of a module around it"


def chain_refusal(module: nn.Module) -> str | None:
    """Return why a module cannot carry a chain, or None when it can.

    A chain is a child of the module and a forward hook. Whoever walks over the module's children would run it as one of
    them, and ``torch.fx`` copies neither.
    """
    if isinstance(module, nn.Sequential) and is_sequence(module):
        return (
            "it is a Sequential whose last step cannot take the chain (it is adapted itself, shared, or TorchScript): put the "
            "adapter on that step's output"
        )
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return f"it is a {base_class(module).__name__}, and the chain would become one of its entries: {_INSTEAD}"
    if isinstance(module, torch.fx.GraphModule):
        return f"it is a torch.fx GraphModule, whose copies lose what its graph does not name: {_INSTEAD}"
    walk = _walks(module)
    if walk:
        return f"its forward walks over its own children ({walk}), and would meet the chain there: {_INSTEAD}"
    return None


def _walks(module: nn.Module) -> str | None:
    """Return the name by which a forward pass, or what it calls of its own class, gets at all children; or None."""
    base: Any = base_class(module)
    if base.__module__.startswith("torch.nn."):
        return None
    own = [getattr(base, name, None) for name in ("forward", "__call__", "__iter__", "__getitem__", "__len__")]
    codes = [getattr(each, "__code__", None) for each in (*source_of(base).functions, *own)]
    found = {name for code in codes if code is not None and _is_users(code) for name in _names(code) & _WALKING}
    return min(found, default=None)


def _is_users(code: CodeType) -> bool:
    return "/torch/nn/modules/" not in code.co_filename.replace("\\", "/")


def _names(code: CodeType) -> set[str]:
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*inner)
