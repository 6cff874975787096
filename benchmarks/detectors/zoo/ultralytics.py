"""ultralytics: its own configurations at their smallest scale. It is licensed AGPL-3.0 and loads when a family is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .subjects import CLASSES, LABELS, Subject, aim, bins, boxes, centred, family

DFL = ("**.dfl.**",)  # its weights, 0 to 15, are a fixed sum written as a convolution; the loss goes past it


def _loss(model: Any, images: Tensor) -> Tensor:
    """Return the sum of the model's own losses."""
    number = len(images)
    batch = {
        "img": images,
        "cls": (LABELS.to(images) - 1)[:, None].repeat(number, 1),
        "bboxes": centred(boxes()).to(images).repeat(number, 1),
        "batch_idx": torch.arange(number).to(images).repeat_interleave(len(LABELS)),
    }
    if hasattr(model, "txt_feats"):
        texts = torch.randn(number, CLASSES, 512, generator=torch.Generator().manual_seed(3))
        batch["txt_feats"] = texts.to(images)
    loss, _ = model.loss(batch)
    model.criterion = None  # made anew for each model: a copy would keep another one's
    return loss.sum()


def _subject(config: Any, kind: str = "DetectionModel", **facts: Any) -> Subject:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    model = getattr(tasks, kind)(config, nc=CLASSES, verbose=False)
    model.args, model.nc = get_cfg(), CLASSES
    if kind == "WorldModel":
        model.txt_feats = torch.randn(1, CLASSES, 512, generator=torch.Generator().manual_seed(2))
        model.model[-1].nc = CLASSES
    head = model.model[-1]
    for branch in ("cv2", "one2one_cv2"):
        aim([level[-1] for level in getattr(head, branch, None) or ()], bins(getattr(head, "reg_max", 1)))
    return Subject(model, _loss, **facts)


@family("ultralytics-yolo-world", "ultralytics")
def _yolo_world() -> Subject:
    """Attention between texts and image features, both ways."""
    return _subject("yolov8n-world.yaml", "WorldModel", bare=DFL)


@family("ultralytics-yolo-world-v2", "ultralytics")
def _yolo_world_v2() -> Subject:
    """Texts attend no more, and the contrastive head has a norm."""
    return _subject("yolov8n-worldv2.yaml", "WorldModel", bare=DFL)


@family("ultralytics-yolo11", "ultralytics")
def _yolo11() -> Subject:
    return _subject("yolo11n.yaml", bare=DFL)


@family("ultralytics-yolo26", "ultralytics")
def _yolo26() -> Subject:
    """No suppression, and no sum over bins."""
    return _subject("yolo26n.yaml")


@family("ultralytics-yolov10", "ultralytics")
def _yolov10() -> Subject:
    """Two heads: one for many boxes, one for one."""
    return _subject("yolov10n.yaml", bare=DFL)


@family("ultralytics-rt-detr", "ultralytics")
def _rt_detr() -> Subject:
    """``nn.MultiheadAttention`` reads ``out_proj.weight`` itself; inference reads the last layer's scores only."""
    return _subject(RT_DETR, "RTDETRDetectionModel", bare=("**.out_proj",), idle=("**.dec_score_head.0",))


RT_DETR = {  # rtdetr-l.yaml, narrow
    "nc": CLASSES,
    "backbone": [
        [-1, 1, "HGStem", [8, 16]],
        [-1, 2, "HGBlock", [16, 32, 3]],
        [-1, 1, "DWConv", [32, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [16, 48, 3]],
        [-1, 1, "DWConv", [48, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [16, 64, 5, True, False]],
        [-1, 1, "DWConv", [64, 3, 2, 1, False]],
        [-1, 2, "HGBlock", [32, 96, 5, True, False]],
    ],
    "head": [
        [-1, 1, "Conv", [32, 1, 1, None, 1, 1, False]],
        [-1, 1, "AIFI", [64, 4]],
        [-1, 1, "Conv", [32, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [5, 1, "Conv", [32, 1, 1, None, 1, 1, False]],
        [[-2, -1], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [-1, 1, "Conv", [32, 1, 1]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [3, 1, "Conv", [32, 1, 1, None, 1, 1, False]],
        [[-2, -1], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [-1, 1, "Conv", [32, 3, 2]],
        [[-1, 15], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [-1, 1, "Conv", [32, 3, 2]],
        [[-1, 10], 1, "Concat", [1]],
        [-1, 1, "RepC3", [32]],
        [[19, 22, 25], 1, "RTDETRDecoder", ["nc", 32, 20, 4, 4, 2, 64]],
    ],
}
