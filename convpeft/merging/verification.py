"""Check a merge on the whole model: whether another module reads a merged layer's weight, and whether outputs agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..convolution.comparison import compare
from ..errors import MergeError
from ..hosts.modules import base_class, base_modules
from ..hosts.trials import private_copy, unobserved
from ..hosts.watching import watched_run
from ..hosts.wrappers import inside
from ..planning.bypasses import weight_readers
from ..planning.examples import ExampleFailed, call_example

_IN_A_MODEL = 1e-6  # a layer's own rounding grows on its way through a deep model


def read_past(model: nn.Module, targets: Mapping[str, nn.Module], example_inputs: Any) -> dict[str, str]:
    """Return, by name, the layers to merge whose weight somebody else reads, with the reason not to rewrite it.

    A layer that its parent reads and calls, too, is in doubt; running the model on example inputs decides.

    Args:
        model: the adapted model.
        targets: by name, the layers that a merge would rewrite.
        example_inputs: of the model, or None.
    """
    ran = None
    if example_inputs is not None:
        plain = inside(model)
        try:
            ran = watched_run(plain, targets.values(), lambda: call_example(plain, example_inputs))
        except ExampleFailed as failed:
            raise MergeError(
                f"this {base_class(plain).__name__} failed on the example inputs: {failed}; the model is unchanged."
            ) from failed.__cause__
    readers = weight_readers(module for _, module in base_modules(model))
    found: dict[str, str] = {}
    for name, target in targets.items():
        reader = readers.get(id(target))
        if ran is not None and id(target) in ran.readers:
            found[name] = _why(f"its weights are read by {ran.readers[id(target)]}")
        elif reader is not None and (reader.certain or ran is None):
            found[name] = _why(f"its parent {reader.class_name} reads {reader.expression} itself")
            if not reader.certain:
                found[name] += ". It may call the layer as well: merge(model, example_inputs=...) finds out by running"
    return found


def _why(what: str) -> str:
    return f"{what}, so rewriting them would change an output that the adapter does not change"


def double_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in float64 and eval mode."""
    return private_copy(inside(model)).double().eval()


def compare_outputs(adapted: nn.Module, merged: nn.Module, example_inputs: Any) -> None:
    """Raise if two float64 models differ on example inputs in any tensor that they return.

    Raises:
        MergeError: naming the output and both numbers, or that there is nothing to compare.
    """
    expected, got = _outputs(adapted, example_inputs), _outputs(merged, example_inputs)
    if not expected or len(expected) != len(got):
        raise MergeError(
            f"this {base_class(adapted).__name__} returned {len(expected)} tensors with its adapters and {len(got)} without, "
            "on the example inputs: nothing that could be compared; the model is unchanged."
        )
    for number, (before, after) in enumerate(zip(expected, got, strict=True)):
        apart = compare(before, after, _IN_A_MODEL)
        if not apart.is_rounding:
            raise MergeError(
                f"merged, this {base_class(adapted).__name__} would not give what it gives with its adapters on the example "
                f"inputs: output {number} of shape {tuple(before.shape)} (then {tuple(after.shape)}) has the largest value "
                f"{apart.largest:.6g} and differs by {apart.difference:.3g}. convpeft.check(model, *inputs) may name the "
                "layer; the model is unchanged."
            )


def _exact(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Return the tensors that a model gives, in float64; it may draw random numbers, the same each time."""
    with torch.no_grad(), unobserved(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            output = call_example(model, example_inputs, _exact)
        except ExampleFailed as failed:
            raise MergeError(
                f"this {base_class(model).__name__} failed in float64 on the example inputs: {failed}; it is unchanged."
            ) from failed.__cause__
    return [value.double() for value in tree_flatten(output)[0] if isinstance(value, Tensor)]
