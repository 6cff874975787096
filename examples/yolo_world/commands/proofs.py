"""Two things the demo shows rather than claims: swapping gives each adapter's own boxes, merging changes none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import convpeft

from ..data.mvtec import DefectImages
from ..training.model import copy_model, use_classes
from ..training.scores import predict


@dataclasses.dataclass(frozen=True)
class Task:
    """One category an adapter is trained for: its name, its data, and its classes' text features."""

    name: str
    train: DefectImages
    test: DefectImages
    texts: Tensor


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


def predict_all(model: nn.Module, tasks: Sequence[Task]) -> list[Tensor]:
    """Return the boxes of the test images of every task, one after the other."""
    return [boxes for task in tasks for boxes in predict(model, task.test, task.texts)]


def show_swap(
    base: nn.Module, files: dict[str, Path], tasks: Sequence[Task], expected: dict[str | None, list[Tensor]]
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


def raw_outputs(model: nn.Module, data: DefectImages, texts: Tensor, dtype: torch.dtype, limit: int) -> Tensor:
    """Return the model's outputs before suppression for the first ``limit`` images: ``(n, 4 + classes, places)``."""
    use_classes(model, texts).eval()
    device = next(model.parameters()).device
    pixels = torch.stack([image for image, _ in data.loaded[:limit]])
    with torch.no_grad():
        chunks = [model(chunk.to(device, dtype) / 255)[0].cpu() for chunk in pixels.split(8)]
    return torch.cat(chunks)


def is_plain(model: nn.Module) -> bool:
    """Return whether no adapter, no adapted class and no key of one is in the model."""
    kinds = {type(module) for module in model.modules()}
    ours = any(kind.__module__.split(".")[0] == "convpeft" or hasattr(kind, "adapted_from") for kind in kinds)
    return not ours and not any("convpeft" in key for key in model.state_dict())


def show_merge(adapted: nn.Module, task: Task) -> tuple[nn.Module, MergeProof]:
    """Return the merged model and how it compares with the adapted one, whose active adapter is the task's."""
    model = copy_model(adapted)
    merged = convpeft.merge(model)
    count = len(task.test)
    before = raw_outputs(model, task.test, task.texts, torch.float32, count)
    after = raw_outputs(merged, task.test, task.texts, torch.float32, count)
    difference = (before - after).abs()
    found, again = predict(model, task.test, task.texts), predict(merged, task.test, task.texts)
    kept = [(a[a[:, 4] > 0.25], b[b[:, 4] > 0.25]) for a, b in zip(found, again, strict=True)]
    same = all(a.shape == b.shape and bool((a[:, 5] == b[:, 5]).all()) for a, b in kept)
    largest = max((float((a - b).abs().max()) for a, b in kept if a.shape == b.shape and len(a)), default=0.0)
    doubled = convpeft.merge(model.double())
    exact = raw_outputs(model, task.test, task.texts, torch.float64, 8)
    relative = (exact - raw_outputs(doubled, task.test, task.texts, torch.float64, 8)).abs().max() / exact.abs().max()
    proof = MergeProof(
        float(difference[:, :4].max()), float(difference[:, 4:].max()), float(relative), is_plain(merged), same, largest
    )
    return merged, proof
