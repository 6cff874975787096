"""torchvision: detectors with their own losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .subjects import CLASSES, LABELS, Subject, boxes, family


def targets(images: Tensor) -> list[dict[str, Tensor]]:
    """Return boxes in pixels, and a class for each."""
    corners = boxes().to(images) * images.shape[-1]
    return [{"boxes": corners, "labels": LABELS} for _ in images]


def _sum_of_losses(model: nn.Module, images: Tensor) -> Tensor:
    losses = model(list(images), targets(images))
    return torch.stack(list(losses.values())).sum()


def _listed(images: Tensor) -> tuple[Any, ...]:
    return (list(images),)


def _head_outputs(model: Any, images: Tensor) -> Any:
    batch, _ = model.transform(list(images))
    return model.head(list(model.backbone(batch.tensors).values()))


def _torchvision(model: nn.Module, raw: Callable[[Any, Tensor], Any] = _head_outputs, size: int = 64) -> Subject:
    return Subject(model, _sum_of_losses, raw, _listed, size)


def _pyramid(norm: type[nn.Module]) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=5)


@family("torchvision-retinanet", "torchvision")
def _retinanet() -> Subject:
    """One head for all levels: each of its convolutions is called five times."""
    from torchvision.models.detection import RetinaNet
    from torchvision.ops import FrozenBatchNorm2d

    backbone = _pyramid(FrozenBatchNorm2d)
    return _torchvision(RetinaNet(backbone, CLASSES, min_size=64, max_size=64, score_thresh=0.0, topk_candidates=50))


@family("torchvision-fcos", "torchvision")
def _fcos() -> Subject:
    from torchvision.models.detection import FCOS

    backbone = _pyramid(nn.BatchNorm2d)
    return _torchvision(FCOS(backbone, CLASSES, min_size=64, max_size=64, score_thresh=0.0, topk_candidates=50))


@family("torchvision-faster-rcnn", "torchvision")
def _faster_rcnn() -> Subject:
    """Two stages: the second reads regions the first proposes, so its raw outputs are taken on fixed regions."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    def raw(model: Any, images: Tensor) -> Any:
        batch, _ = model.transform(list(images))
        features = model.backbone(batch.tensors)
        regions = [target["boxes"].to(batch.tensors.dtype) for target in targets(images)]
        pooled = model.roi_heads.box_roi_pool(features, regions, batch.image_sizes)
        return model.rpn.head(list(features.values())), model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))

    model = FasterRCNN(
        _pyramid(nn.BatchNorm2d),
        min_size=64,
        max_size=64,
        box_head=TwoMLPHead(256 * 7 * 7, 64),
        box_predictor=FastRCNNPredictor(64, CLASSES),
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=10,
        box_score_thresh=0.0,
    )
    return _torchvision(model, raw)


@family("torchvision-ssdlite", "torchvision")
def _ssdlite() -> Subject:
    """Depthwise convolutions throughout, at the one size (320) the family has."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, score_thresh=0.0, topk_candidates=50)
    return _torchvision(model, size=320)
