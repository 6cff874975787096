"""Which dtype operations run in: autocast's, if it is on, else that of their operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts a convolution's ``x`` to, or None if it is off or does not cast ``x``."""
    kind = x.device.type
    if x.dtype == torch.float64:
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if kind == "cuda" and torch.is_autocast_enabled() else None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast casts nothing of the dtype and device of ``x``; none is entered if it is off."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
