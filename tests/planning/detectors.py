"""The smallest real model of each family that an alias file of the package is for; no weights, no network."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from tests.references import mmdet_skeleton, mmyolo_skeleton

CLASSES = 4


def _ultralytics(config: str, kind: str = "DetectionModel") -> nn.Module:
    from ultralytics.nn import tasks

    model: nn.Module = getattr(tasks, kind)(f"{config}.yaml", nc=CLASSES, verbose=False)
    return model


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import detection

    model: nn.Module = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    return model


def _transformers(kind: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES)
    model: nn.Module = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return model


def _libreyolo(module: str, kind: str, *args: Any, **options: Any) -> nn.Module:
    model: nn.Module = getattr(import_module(f"libreyolo.models.{module}.nn"), kind)(*args, **options)
    return model


MODELS = {
    "yolov8-world": lambda: _ultralytics("yolov8n-worldv2", "WorldModel"),
    "yolov8": lambda: _ultralytics("yolov8n"),
    "yolo11": lambda: _ultralytics("yolo11n"),
    "yolo12": lambda: _ultralytics("yolo12n"),
    "yolo26": lambda: _ultralytics("yolo26n"),
    "mmyolo-yolo-world": lambda: mmyolo_skeleton.WorldImagePart("n"),
    "mmdet-rtmdet": lambda: mmdet_skeleton.rtmdet_named(_libreyolo("rtmdet", "LibreRTMDetModel", "t", CLASSES)),
    "mmdet-yolox": mmdet_skeleton.yolox_s,
    "torchvision-retinanet": lambda: _torchvision("retinanet_resnet50_fpn"),
    "torchvision-fcos": lambda: _torchvision("fcos_resnet50_fpn"),
    "torchvision-faster-rcnn": lambda: _torchvision("fasterrcnn_resnet50_fpn"),
    "torchvision-ssdlite": lambda: _torchvision("ssdlite320_mobilenet_v3_large"),
    "transformers-rt-detr": lambda: _transformers("RTDetr"),
    "transformers-rt-detr-v2": lambda: _transformers("RTDetrV2"),
    "transformers-d-fine": lambda: _transformers("DFine"),
    "libreyolo-yolox": lambda: _libreyolo("yolox", "LibreYOLOXModel", "s", CLASSES),
    "libreyolo-rtmdet": lambda: _libreyolo("rtmdet", "LibreRTMDetModel", "t", CLASSES),
    "libreyolo-yolov9": lambda: _libreyolo("yolo9", "LibreYOLO9Model", "t", nb_classes=CLASSES),
}
