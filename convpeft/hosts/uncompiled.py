"""Run compiled parts of a model as they were written."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch


def uncompiled() -> Any:
    """Return a context in which compiled parts of a model run as they were written, where this torch can."""
    stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    return nullcontext() if stance is None else stance("force_eager")
