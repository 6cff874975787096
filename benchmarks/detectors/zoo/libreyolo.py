"""libreyolo: MIT-licensed YOLOs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .subjects import CLASSES, LABELS, Subject, aim, bins, boxes, centred, family


def _network(module: str, kind: str, *args: Any, **options: Any) -> Any:
    return getattr(import_module(f"libreyolo.models.{module}.nn"), kind)(*args, **options)


def _labelled(images: Tensor, corners: Tensor) -> Tensor:
    """Return a class and four numbers for each box, for each image."""
    rows = torch.cat([(LABELS.to(images) - 1)[:, None], corners.to(images)], 1)
    return rows.expand(len(images), -1, -1)


def _yolox_loss(model: Any, images: Tensor) -> Tensor:
    return model(images, targets=_labelled(images, images.shape[-1] * centred(boxes())))["total_loss"]


def _yolov9_loss(model: Any, images: Tensor) -> Tensor:
    return model(images, targets=_labelled(images, boxes()))["total_loss"]


def _in_pixels(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    corners = images.shape[-1] * boxes().to(images)
    return [corners for _ in images], [LABELS - 1 for _ in images]


def _rtmdet_loss(model: Any, images: Tensor) -> Tensor:
    from libreyolo.models.rtmdet.loss import RTMDetLoss

    return RTMDetLoss(CLASSES)(*model(images), *_in_pixels(images))["total_loss"]


def _picodet_loss(model: Any, images: Tensor) -> Tensor:
    from libreyolo.models.picodet.loss import PICODETLoss

    return PICODETLoss(CLASSES)(*model(images), *_in_pixels(images))["total_loss"]


@family("libreyolo-yolox", "libreyolo")
def _yolox() -> Subject:
    model = _network("yolox", "LibreYOLOXModel", "n", CLASSES)
    aim(model.head.reg_preds, torch.tensor([0.0, 0.0, 0.7, 0.7]))  # centre, and the logarithm of two cells
    return Subject(model, _yolox_loss)


@family("libreyolo-yolov9", "libreyolo")
def _yolov9() -> Subject:
    model = _network("yolo9", "LibreYOLO9Model", "t", nb_classes=CLASSES)
    aim([level[-1] for level in model.head.cv2], bins(model.head.reg_max))
    return Subject(model, _yolov9_loss)


@family("libreyolo-rtmdet", "libreyolo")
def _rtmdet() -> Subject:
    """One head for all levels, with norms of each level's own."""
    model = _network("rtmdet", "LibreRTMDetModel", "t", CLASSES)
    aim(model.head.rtm_reg, torch.ones(4))
    return Subject(model, _rtmdet_loss)


@family("libreyolo-picodet", "libreyolo")
def _picodet() -> Subject:
    return Subject(_network("picodet", "LibrePICODETModel", "s", CLASSES), _picodet_loss)
