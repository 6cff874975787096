"""Which dtype operations run in: autocast's, if it is on, else that of their operands; and dtypes by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype that adapters can have, given as a dtype or by its name; None stays None.

    Raises:
        OptionError: for anything else.

    Example:
        >>> floating_dtype("float32")
        torch.float32
    """
    known = {str(each).removeprefix("torch."): each for each in DTYPES}
    if dtype is None or any(dtype is each for each in DTYPES):
        return dtype  # type: ignore[return-value]
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in known:
        return known[dtype.removeprefix("torch.")]
    raise OptionError(
        f"dtype must be one of {', '.join(known)} (or None: the base's), not {dtype!r}; the model is unchanged"
    )


def in_dtype(tensor: Any, dtype: torch.dtype | None) -> Any:
    """Return a floating-point tensor in another dtype; what is no such tensor, and None for a dtype, change nothing."""
    if dtype is None or not isinstance(tensor, Tensor) or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)
