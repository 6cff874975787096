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


def score(found: list[Tensor], data: DetectionImages) -> Scores:
    """Return the mean average precision of boxes as ``predict`` gives them; a class without true boxes is left out."""
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    metric = MeanAveragePrecision(
        box_format="xyxy", iou_type="bbox", class_metrics=False, backend="pycocotools", sync_on_compute=False
    )
    metric.warn_on_many_detections = False
    predictions = [{"boxes": boxes[:, :4], "scores": boxes[:, 4], "labels": boxes[:, 5].long()} for boxes in found]
    targets = targets_of(data)
    metric.update(predictions, targets)
    both = metric.compute()
    by_class = {}
    for label, name in enumerate(data.classes):
        single = MeanAveragePrecision(
            box_format="xyxy", iou_type="bbox", iou_thresholds=[0.5], backend="pycocotools", sync_on_compute=False
        )
        single.warn_on_many_detections = False
        single.update(only_label(predictions, label), only_label(targets, label))
        by_class[name] = max(float(single.compute()["map"]), 0.0)
    return Scores(max(float(both["map_50"]), 0.0), max(float(both["map"]), 0.0), by_class)


def only_label(items: list[dict[str, Tensor]], label: int) -> list[dict[str, Tensor]]:
    """Return the items with only the entries of one label."""
    return [{key: value[item["labels"] == label] for key, value in item.items()} for item in items]


def evaluate(model: nn.Module, data: DetectionImages, texts: Tensor, *, batch_size: int = 8) -> Scores:
    """Return the model's scores on ``data``; puts the model in eval mode."""
    return score(predict(model, data, texts, batch_size=batch_size), data)
