"""effdet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .subjects import CLASSES, LABELS, Subject, boxes, family

SIDE = 128


def _targets(images: Tensor) -> dict[str, Any]:
    corners = (SIDE * boxes().to(images))[:, [1, 0, 3, 2]]  # top, left, bottom, right
    return {"bbox": [corners for _ in images], "cls": [LABELS.to(images) for _ in images]}


def _arguments(images: Tensor) -> tuple[Any, ...]:
    count = len(images)
    return images, {**_targets(images), "img_scale": torch.ones(count), "img_size": torch.full((count, 2), float(SIDE))}


def _loss(bench: nn.Module, images: Tensor) -> Tensor:
    return bench(images, _targets(images))["loss"]


def _raw(bench: Any, images: Tensor) -> Any:
    return bench.model(images)


@family("effdet-d0", "effdet")
def _effdet() -> Subject:
    """``Conv2dSame`` again, weighted feature fusion, and head convolutions that all levels share."""
    import effdet

    options = {"image_size": (SIDE, SIDE), "pretrained": False, "pretrained_backbone": False, "num_classes": CLASSES}
    model = effdet.create_model("tf_efficientdet_d0", bench_task="train", bench_labeler=True, **options)
    return Subject(model, _loss, _raw, _arguments, SIDE)
