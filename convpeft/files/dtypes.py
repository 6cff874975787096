"""Tensors of a file whose dtypes differ from those beside them: they would load, and fail in the forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..adapters.base import Adapter
from ..errors import AdapterFileError, brief
from .header import ADAPTER, tensor_key
from .reading import DTYPES, Entry

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
_HALVES = (torch.float16, torch.bfloat16)


def norms_of(adapter: Adapter, layer: str) -> dict[str, str]:
    """Return the norm inside an adapter that each tensor of a norm belongs to, by the tensor's key in a file."""
    return {
        tensor_key(ADAPTER, layer, f"{name}.{key}"): name
        for name, module in adapter.named_modules()
        if isinstance(module, _NORMS)
        for key in module.state_dict()
    }


def fitted(tensor: Tensor, old: torch.dtype, keep: bool) -> Tensor:
    """Return a copy of a file's tensor in the dtype that it has in a model: its own, or that of what it stands for there.

    Args:
        tensor: of the file.
        old: dtype of the tensor that it stands for.
        keep: its own, unless ``old`` holds all of its numbers and more.

    Raises:
        AdapterFileError: if a number overflows; without the names of file and tensor.
    """
    own = tensor.dtype
    made = tensor.to(fitted_dtype(own, old, keep), copy=True)
    if made.dtype != own and not torch.equal(made.isfinite(), tensor.isfinite()):
        raise AdapterFileError(f"overflows {made.dtype}")
    return made


def fitted_dtype(own: torch.dtype, old: torch.dtype, keep: bool) -> torch.dtype:
    """Return the dtype of ``fitted``."""
    wider = own.is_floating_point and torch.promote_types(own, old) == old
    return own if keep and not wider else old


def mixed_dtypes(here: Mapping[str, Tensor], there: Mapping[str, Entry], norms: Mapping[str, str]) -> list[str]:
    """Return a problem for each tensor whose dtype in the file is not that of the tensors beside it.

    What has one dtype here has one in the file. A norm may be in float32 beside half precision, as a whole.

    Args:
        here: the tensors of one adapter or one unfrozen module, by key in the file.
        there: shape and dtype in the file.
        norms: see ``norms_of``.
    """
    first: dict[tuple[torch.dtype, str], tuple[str, torch.dtype]] = {}
    problems: list[str] = []
    for key, tensor in here.items():
        saved = DTYPES.get(there[key][1]) if key in there else None
        if saved is None or not (saved.is_floating_point and tensor.is_floating_point()):
            continue
        other, beside = first.setdefault((tensor.dtype, norms.get(key, "")), (key, saved))
        if saved != beside:
            problems.append(_problem(key, saved, other, beside))
    plain = [entry for (_, norm), entry in first.items() if not norm]
    for (_, norm), (key, saved) in first.items():
        if norm and plain and saved != plain[0][1] and not (saved == torch.float32 and plain[0][1] in _HALVES):
            problems.append(_problem(key, saved, *plain[0]))
    return problems


def _problem(key: str, saved: torch.dtype, other: str, beside: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (saved, beside)]
    return f"{brief(key)} is {names[0]} in the file, and {brief(other)} beside it is {names[1]}"
