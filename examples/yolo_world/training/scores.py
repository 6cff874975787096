"""Run a detector over a data set: its boxes, and its mean average precision by torchmetrics and pycocotools."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.images import DetectionImages
from .model import decode, use_classes


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean average precision over classes: at IoU 0.5, over IoU 0.5 to 0.95, and at 0.5 for each class."""

    map50: float
    map50_95: float
    map50_by_class: dict[str, float]


COCO_NUMBERS = {
    "map": "mAP50-95", "map_50": "mAP50", "map_75": "mAP75", "map_small": "mAP small", "map_medium": "mAP medium",
    "map_large": "mAP large", "mar_1": "recall 1", "mar_10": "recall 10", "mar_100": "recall 100",
}  # fmt: skip
"""COCO's numbers by torchmetrics' names, and what they are called in the table."""


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """One class of the test images: images that show it, true boxes, and its average precision (None without boxes)."""

    name: str
    images: int
    boxes: int
    map50: float | None
    map50_95: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """COCO's numbers by name, None where there is nothing to count, and the scores of each class."""

    numbers: dict[str, float | None]
    classes: tuple[ClassScores, ...]


def predict(
    model: nn.Module, data: DetectionImages, texts: Tensor, *, batch_size: int = 8, title: str | None = None
) -> list[Tensor]:
    """Return the boxes of every image of ``data`` in order, on the CPU; puts the model in eval mode.

    Boxes are ``(n, 6)``: x1 y1 x2 y2 in pixels of the resized image, confidence, class. With a ``title`` there is a
    progress bar.
    """
    use_classes(model, texts).eval()
    device = next(model.parameters()).device
    found: list[Tensor] = []
    starts = range(0, len(data), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=title is None, leave=False):
        pixels = torch.stack([data.loaded[index][0] for index in range(start, min(start + batch_size, len(data)))])
        found += [boxes.cpu() for boxes in decode(model, pixels.to(device).float() / 255)]
    return found


def corners(boxes: Tensor, size: int) -> Tensor:
    """Return centre-x centre-y width height in [0, 1] as x1 y1 x2 y2 in pixels of an image of ``size``."""
    half = boxes[:, 2:] / 2
    return torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1) * size


def targets_of(data: DetectionImages) -> list[dict[str, Tensor]]:
    """Return the true boxes and labels of every image, as torchmetrics wants them."""
    return [
        {"boxes": corners(boxes, data.size), "labels": labels}
        for boxes, labels in zip(data.boxes, data.labels, strict=True)
    ]


def report(found: list[Tensor], data: DetectionImages) -> Report:
    """Return COCO's numbers, over all classes and for each, of boxes as ``predict`` gives them.

    Small, medium and large are COCO's (below 32 x 32, below 96 x 96, above), in pixels of the resized image.
    """
    predictions = [{"boxes": boxes[:, :4], "scores": boxes[:, 4], "labels": boxes[:, 5].long()} for boxes in found]
    targets = targets_of(data)
    classes = []
    for label, name in enumerate(data.classes):
        truth = only_label(targets, label)
        counts = [len(item["labels"]) for item in truth]
        own = measured(only_label(predictions, label), truth) if sum(counts) else dict.fromkeys(COCO_NUMBERS)
        classes.append(ClassScores(name, sum(map(bool, counts)), sum(counts), own["map_50"], own["map"]))
    return Report(measured(predictions, targets), tuple(classes))


def measured(items: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Return COCO's numbers of predictions against the truth in this process; None where there is nothing to count."""
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools", sync_on_compute=False)
    metric.warn_on_many_detections = False
    metric.update(items, truth)
    values = metric.compute()
    return {name: None if float(values[name]) < 0 else float(values[name]) for name in COCO_NUMBERS}


def score(found: list[Tensor], data: DetectionImages) -> Scores:
    """Return the mean average precision of boxes as ``predict`` gives them, 0 where there is nothing to count."""
    whole = report(found, data)
    by_class = {each.name: each.map50 or 0.0 for each in whole.classes}
    return Scores(whole.numbers["map_50"] or 0.0, whole.numbers["map"] or 0.0, by_class)


def only_label(items: list[dict[str, Tensor]], label: int) -> list[dict[str, Tensor]]:
    """Return the items with only the entries of one label."""
    return [{key: value[item["labels"] == label] for key, value in item.items()} for item in items]


def evaluate(model: nn.Module, data: DetectionImages, texts: Tensor, *, batch_size: int = 8) -> Scores:
    """Return the model's scores on ``data``; puts the model in eval mode."""
    return score(predict(model, data, texts, batch_size=batch_size), data)
