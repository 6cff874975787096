"""Example inputs: the calls they can mean, and what a model makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from ..hosts.modules import base_class


class ExampleFailed(Exception):
    """No call that the example inputs can mean succeeded; the text says what the model raised, as the end of a sentence."""


@dataclass(frozen=True)
class Call:
    """What a model is called with, and in words how the example was read."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reading: str


def call_example(model: nn.Module, example: Any, change: Callable[[Any], Any] | None = None) -> Any:
    """Return what a model makes of example inputs.

    A tuple holds positional inputs and a mapping keyword arguments; anything else is the one input. A list holds
    positional inputs too, or is the one input where the model takes it so (torchvision's detectors), and a mapping may be
    the one input as well: the first reading that the forward's signature allows and the model runs on counts.

    Args:
        model: is called once for each reading, until one succeeds.
        example: the inputs.
        change: of each tensor (and every other leaf) before the call.

    Raises:
        ExampleFailed: from the model's own error, if all readings fail.
    """
    failed: list[tuple[str, Exception]] = []
    for call in readings(model, example):
        args, kwargs = (call.args, call.kwargs) if change is None else tree_map(change, (call.args, call.kwargs))
        try:
            return model(*args, **kwargs)
        except Exception as error:  # the user's own model: whatever it raises is said
            failed.append((call.reading, error))
    said = [f"{type(error).__name__}: {error}" for _, error in failed]
    text = (
        said[0]
        if len(said) == 1
        else "; ".join(f"as {how}, {what}" for (how, _), what in zip(failed, said, strict=True))
    )
    raise ExampleFailed(text) from failed[0][1]


def readings(model: nn.Module, example: Any) -> list[Call]:
    """Return the calls that example inputs can mean, the likeliest first: those that the forward's signature allows."""
    if isinstance(example, Mapping):
        calls = [Call((), dict(example), "keyword arguments"), Call((example,), {}, "one mapping")]
    elif isinstance(example, list):
        calls = [Call(tuple(example), {}, f"{len(example)} positional inputs"), Call((example,), {}, "one list")]
    else:
        args = tuple(example) if isinstance(example, tuple) else (example,)
        return [Call(args, {}, f"{len(args)} positional inputs")]
    return [call for call in calls if _allows(model, call)] or calls[:1]


def _allows(model: nn.Module, call: Call) -> bool:
    """Return whether the signature of a model's own forward allows a call, or tells nothing."""
    replaced = model.__dict__.get("forward")
    try:
        signature = inspect.signature(base_class(model).forward if replaced is None else replaced)
    except (TypeError, ValueError, AttributeError):
        return True
    try:
        signature.bind(*(() if replaced is not None else (model,)), *call.args, **call.kwargs)
    except TypeError:
        return False
    return True
