"""What is measured rather than claimed: a merge changes no output, and swapping gives each adapter's own boxes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import convpeft

from ..training.model import copy_model
from ..training.scores import predict
from .session import CommandError, Data

EXACT = 1e-11
"""Largest relative difference of the whole detector in float64: each layer agrees to 1e-12, and depth adds to that."""


class CheckError(CommandError):
    """A merged or exported model that does not compute what it must: says both numbers."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two raw outputs are apart: the boxes in pixels, and the scores, which lie between 0 and 1."""

    pixels: float
    scores: float

    def within(self, tolerance: float, size: int) -> bool:
        """Return whether the boxes, as shares of the image's size, and the scores differ by no more than ``tolerance``."""
        return self.pixels <= tolerance * size and self.scores <= tolerance


def compare_outputs(first: Tensor, second: Tensor) -> Difference:
    """Return the largest differences of two raw outputs ``(n, 4 + classes, places)``; NaN where one is not finite."""
    if first.shape != second.shape:
        return Difference(math.inf, math.inf)
    difference = (first.double() - second.double()).abs()
    return Difference(float(difference[:, :4].max()), float(difference[:, 4:].max()))


def raw_output(model: nn.Module, images: Tensor) -> Tensor:
    """Return the boxes and scores of every place before suppression, ``(n, 4 + classes, places)``, in eval mode."""
    model.eval()
    with torch.no_grad():
        output = model(images)
    return (output if isinstance(output, Tensor) else output[0]).clone()


def example_images(size: int, count: int = 1) -> Tensor:
    """Return images of even noise from a fixed seed, ``(count, 3, size, size)`` in [0, 1]: they excite every layer."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def largest_relative(adapted: nn.Module, merged: nn.Module, images: Tensor) -> float:
    """Return the largest difference of two models in float64, relative to the largest output; both stay as they are."""
    first, second = (raw_output(copy_model(model).double(), images.double()) for model in (adapted, merged))
    return float((first - second).abs().max() / first.abs().max())


def check_merged(adapted: nn.Module, form: str, images: Tensor, *, strict: bool) -> float:
    """Return how far a merge in float64 is from the adapted model, relative to the largest output.

    Raises:
        CheckError: if they differ by more than rounding.
    """
    doubled = copy_model(adapted).double()
    found = largest_relative(doubled, convpeft.merge(doubled, form=form, strict=strict), images)
    if not found <= EXACT:
        raise CheckError(
            f"the merged detector is {found:.2e} from the adapted one in float64, relative to the largest output; no more than "
            f"{EXACT:.0e} would be rounding. Nothing was written."
        )
    return found


def is_plain(model: nn.Module) -> bool:
    """Return whether no adapter, no adapted class and no key of one is in the model."""
    kinds = {type(module) for module in model.modules()}
    ours = any(kind.__module__.split(".")[0] == "convpeft" or hasattr(kind, "adapted_from") for kind in kinds)
    return not ours and not any("convpeft" in key for key in model.state_dict())


@dataclasses.dataclass(frozen=True)
class SwapProof:
    """The order in which adapters were switched, and for each switch whether every box was the expected one, bit for bit."""

    order: tuple[str, ...]
    equal: tuple[bool, ...]
    boxes: int

    @property
    def exact(self) -> bool:
        """Whether all of them were."""
        return all(self.equal)


@dataclasses.dataclass(frozen=True)
class MergeProof:
    """How far the merged model's raw outputs are from the adapted one's, and whether plain layers are all that is left.

    ``pixels`` and ``scores`` are the largest absolute differences in float32 before suppression, over all boxes of all
    test images; ``float64`` is the largest relative one when both models run in double precision.
    """

    pixels: float
    scores: float
    float64: float
    plain: bool
    same_boxes: bool
    largest_box_difference: float


def same_boxes(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether two predictions are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def predict_all(model: nn.Module, tasks: Sequence[Data]) -> list[Tensor]:
    """Return the boxes of the test images of every task, one after the other."""
    return [boxes for task in tasks for boxes in predict(model, task.test, task.texts)]


def show_swap(
    base: nn.Module, files: dict[str, Path], tasks: Sequence[Data], expected: dict[str | None, list[Tensor]]
) -> SwapProof:
    """Load the adapter files into a fresh copy of the base, switch back and forth, and compare all boxes.

    Args:
        base: the bare base, never adapted.
        files: adapter file by adapter name.
        tasks: whose test images are looked at.
        expected: boxes by adapter name as they came from training, and the bare base's under None.
    """
    fresh = copy_model(base)
    for name, path in files.items():
        convpeft.load_adapter(fresh, path, name=name)
    order: list[str | None] = [*files, None, *reversed(files), None]
    equal = []
    for active in order:
        convpeft.set_active(fresh, active)
        equal.append(same_boxes(predict_all(fresh, tasks), expected[active]))
    count = sum(len(boxes) for boxes in expected[next(iter(files))])
    return SwapProof(tuple(str(name) for name in order), tuple(equal), count)


def show_merge(adapted: nn.Module, task: Data) -> tuple[nn.Module, MergeProof]:
    """Return the merged model and how it compares with the adapted one, whose active adapter is the task's."""
    model = copy_model(adapted)
    merged = convpeft.merge(model)
    found, again = (predict(each, task.test, task.texts) for each in (model, merged))
    kept = [(a[a[:, 4] > 0.25], b[b[:, 4] > 0.25]) for a, b in zip(found, again, strict=True)]
    same = all(a.shape == b.shape and bool((a[:, 5] == b[:, 5]).all()) for a, b in kept)
    largest = max((float((a - b).abs().max()) for a, b in kept if a.shape == b.shape and len(a)), default=0.0)
    device = next(model.parameters()).device
    pixels = torch.stack([image for image, _ in task.test.loaded[:]]).float().div(255).split(8)
    parts = [compare_outputs(*(raw_output(each, part.to(device)) for each in (model, merged))) for part in pixels]
    doubled = copy_model(model).double()
    relative = largest_relative(doubled, convpeft.merge(doubled), pixels[0].to(device))
    furthest = [max(getattr(part, name) for part in parts) for name in ("pixels", "scores")]
    return merged, MergeProof(*furthest, relative, is_plain(merged), same, largest)
