"""timm: backbones; a classifier's loss is cross-entropy, a pyramid's is the size of its maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .subjects import CLASSES, Subject, family


def _classified(model: nn.Module, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images), torch.arange(len(images)) % CLASSES)


def _energy(model: nn.Module, images: Tensor) -> Tensor:
    return torch.stack([level.square().mean() for level in model(images)]).sum()


def _classifier(name: str, **options: Any) -> Subject:
    import timm

    return Subject(timm.create_model(name, pretrained=False, num_classes=CLASSES, **options), _classified)


def _levels(name: str) -> Subject:
    import timm

    return Subject(timm.create_model(name, pretrained=False, features_only=True), _energy)


@family("timm-resnet", "timm")
def _resnet() -> Subject:
    return _classifier("resnet18")


@family("timm-resnet-pyramid", "timm")
def _resnet_pyramid() -> Subject:
    """As detectors use it: a ``ModuleDict`` that returns the maps of five strides."""
    return _levels("resnet18")


@family("timm-convnext", "timm")
def _convnext() -> Subject:
    """Depthwise 7x7, LayerNorm, and Linear layers that see channels last."""
    return _classifier("convnext_atto")


@family("timm-efficientnet-tf", "timm")
def _efficientnet_tf() -> Subject:
    """``Conv2dSame``: padding worked out anew for each input."""
    return _classifier("tf_efficientnet_b0")


@family("timm-mobilenetv4", "timm")
def _mobilenetv4() -> Subject:
    return _classifier("mobilenetv4_conv_small_050")


@family("timm-repvgg", "timm")
def _repvgg() -> Subject:
    """Branches that a later ``reparameterize`` would fold."""
    return _classifier("repvgg_a0")


@family("timm-fastvit", "timm")
def _fastvit() -> Subject:
    return _classifier("fastvit_t8")
