"""segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .subjects import CLASSES, Subject, family


def _dice(model: nn.Module, images: Tensor) -> Tensor:
    from segmentation_models_pytorch.losses import DiceLoss

    side = images.shape[-1]
    mask = torch.arange(side * side).reshape(1, side, side) % CLASSES
    return DiceLoss("multiclass")(model(images), mask.expand(len(images), -1, -1))


def _segmenter(name: str, encoder: str, **options: Any) -> Subject:
    import segmentation_models_pytorch as smp

    return Subject(smp.create_model(name, encoder, encoder_weights=None, classes=CLASSES, **options), _dice)


@family("smp-unet", "segmentation_models_pytorch")
def _unet() -> Subject:
    return _segmenter("unet", "resnet18")


@family("smp-fpn", "segmentation_models_pytorch")
def _fpn() -> Subject:
    """GroupNorm in the decoder."""
    return _segmenter("fpn", "mobilenet_v2")


@family("smp-deeplabv3plus", "segmentation_models_pytorch")
def _deeplabv3plus() -> Subject:
    """Dilated convolutions in the encoder, dilated depthwise ones in the decoder."""
    return _segmenter("deeplabv3plus", "resnet18", decoder_atrous_rates=(2, 4, 6))
