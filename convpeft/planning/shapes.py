"""From the shapes that a module's output had to the axis of its channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..hosts.forward import entry_index, no_entry
from .contracts import OutputShape

Latest = tuple[tuple[int, ...], int]  # the shape of a layer's output, and the axis of its channels from the end


@dataclass(frozen=True)
class Seen:
    """What one run showed of a module's output.

    Attributes:
        shape: of the output; empty where there is none.
        latest: shape of the output of the layer that ran last, among those whose channels' axis is certain, and that axis.
        missing: why there is no shape, in words.
    """

    shape: tuple[int, ...]
    latest: Latest | None = None
    missing: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is known of a module's output.

    Attributes:
        shape: its channels.
        refusal: why no adapter can work on it, as the end of a sentence.
        unclear: why neither is known, in words.
    """

    shape: OutputShape | None = None
    refusal: str = ""
    unclear: str = ""

    @property
    def found(self) -> bool:
        """Return whether it is known what an adapter has to work on."""
        return self.shape is not None or bool(self.refusal)

    def shape_fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether an output of that shape can have these channels."""
        if self.shape is None or not shape:
            return self.shape is None
        axis = len(shape) - 1 if self.shape.channels_last else len(shape) - 3
        return axis >= 0 and shape[axis] == self.shape.channels


def look(output: Any, entry: int | str | None, latest: Sequence[Latest]) -> Seen:
    """Return what is to be seen of a module's output: a shape, or why there is none."""
    if entry is not None:
        missing = no_entry(output, entry)
        if missing is not None:
            return Seen((), missing=missing)
        output = output[entry_index(output, entry)]
    if not isinstance(output, Tensor):
        return Seen((), missing=f"the module returned a {type(output).__name__}, not a tensor")
    return Seen(tuple(output.shape), latest[0] if latest else None)


def settle(seen: list[Seen], channels: int | None) -> Verdict:
    """Return what the outputs of runs on inputs of different sizes say of the channels.

    The channels' axis has one length whatever the size, and so has no other. With a single run, or if several axes stay
    as they are, the layer that ran last among those whose axis is certain decides; then the number that a rule says.
    """
    missing = next((each.missing for each in seen if each.missing), "")
    shapes = [each.shape for each in seen if each.shape]
    if missing or not shapes:
        return Verdict(unclear=missing)
    first, varied = shapes[0], len(shapes) > 1
    if len(first) < 2 or any(len(shape) != len(first) for shape in shapes):
        return Verdict(unclear=f"its output had the shape {first}")
    if len(first) == 2:
        return _on(first, 1)
    axes = [axis for axis, length in enumerate(first) if all(shape[axis] == length for shape in shapes)]
    axes = _telling(first, axes, varied=varied)
    if varied and len(axes) == 1:
        return _on(first, axes[0])
    axis = _by_layer(seen[0], axes, varied=varied)
    if axis is None:
        of_length = [each for each in axes if first[each] == channels]
        axis = of_length[0] if len(of_length) == 1 else None
    if axis is not None:
        return _on(first, axis)
    return Verdict(unclear=f"its output had the shape {first}, and which axis is the channels does not show")


def _telling(shape: tuple[int, ...], axes: list[int], *, varied: bool) -> list[int]:
    """Return those of the axes that can be the channels: none of length 1 where others are longer, and not the batch."""
    axes = [axis for axis in axes if shape[axis] > 1] or axes
    first_is_batch = len(shape) > 3 or (varied and len(axes) > 1)
    return [axis for axis in axes if axis or not first_is_batch]


def _by_layer(seen: Seen, axes: list[int], *, varied: bool) -> int | None:
    """Return the one of the axes that the layer which ran last speaks for, or None.

    After one run only a layer of the very same output shape does. Where other sizes changed nothing (pooling to a fixed
    size), the axis that has the number of its channels is enough.
    """
    if seen.latest is None or (seen.latest[0] != seen.shape and not varied):
        return None
    shape, axis = seen.latest
    if len(shape) < -axis:
        return None
    of_length = [each for each in axes if seen.shape[each] == shape[axis]]
    own = len(seen.shape) + axis
    return (
        own if own in of_length and (varied or len(of_length) == 1) else of_length[0] if len(of_length) == 1 else None
    )


def _on(shape: tuple[int, ...], axis: int) -> Verdict:
    """Return the verdict for channels on an axis of an output: an adapter works on images, and on the last axis."""
    if axis == len(shape) - 1:
        return Verdict(OutputShape(shape[axis], True))
    if (len(shape), axis) in ((4, 1), (3, 0)):
        return Verdict(OutputShape(shape[axis], False))
    return Verdict(
        refusal=f"its output had the shape {shape} with the channels on axis {axis}; an adapter works on images, "
        "(N, C, H, W), and on outputs whose last axis is the channels"
    )
