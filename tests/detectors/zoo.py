"""The families the contract runs on: small members, random weights, built offline. One function adds a family.

Each function is named by its ``family`` decorator and returns a ``Subject``: the model, and how to run it, read its raw
outputs and get its own training loss. Packages load when a family is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4


def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images)


@dataclass
class Subject:
    """One model under the contract.

    Attributes:
        model: in float32, with random weights and norm statistics to match them.
        loss: gives the loss a user would train with on a batch of images; the model is in training mode.
        raw: gives the outputs before thresholds and suppression, which jump where a score barely moves.
        predict: gives what a user gets.
        size: of the square images.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor], Tensor]
    raw: Callable[[nn.Module, Tensor], Any] = _call
    predict: Callable[[nn.Module, Tensor], Any] = _call
    size: int = 64

    def images(self, count: int = 1, seed: int = 1) -> Tensor:
        """Return random images."""
        return torch.rand(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Family:
    """A name, the packages it needs beside torch, and the function that builds it."""

    name: str
    packages: tuple[str, ...]
    make: Callable[[], Subject]

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(package for package in self.packages if find_spec(package) is None)

    def build(self) -> Subject:
        """Return a new subject, always with the same weights and statistics, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            subject = self.make()
            _settle_norms(subject)
        return subject


FAMILIES: dict[str, Family] = {}


def family(name: str, *packages: str) -> Callable[[Callable[[], Subject]], Callable[[], Subject]]:
    """Register the function below as a family that needs ``packages``."""

    def register(make: Callable[[], Subject]) -> Callable[[], Subject]:
        FAMILIES[name] = Family(name, packages, make)
        return make

    return register


def _settle_norms(subject: Subject) -> None:
    """Give every BatchNorm weights of its own and the statistics of one batch, in place, as if the model were trained.

    Some families start the last norm of a block at zero, and nothing inside the block would get a gradient.
    """
    norms = [m for m in subject.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches seen
    with torch.no_grad():
        subject.raw(subject.model.train(), subject.images(4, seed=2))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    subject.model.eval()


# torchvision: detectors with their own losses


def _targets(images: Tensor) -> list[dict[str, Tensor]]:
    """Return boxes of all sizes, so that every level of a pyramid has something to learn."""
    sides = torch.tensor([0.2, 0.35, 0.5, 0.65, 0.8, 0.95], dtype=images.dtype)
    centres = torch.tensor([0.52, 0.45, 0.5, 0.5, 0.25, 0.5], dtype=images.dtype)
    low, high = (centres - sides / 2).clamp(0, 1), (centres + sides / 2).clamp(0, 1)
    boxes = torch.stack([low, low, high, high], 1) * images.shape[-1]
    return [{"boxes": boxes, "labels": torch.tensor([1, 2, 3, 1, 2, 3])} for _ in images]


def _sum_of_losses(model: nn.Module, images: Tensor) -> Tensor:
    losses = model(list(images), _targets(images))
    return torch.stack(list(losses.values())).sum()


def _listed(model: nn.Module, images: Tensor) -> Any:
    return model(list(images))


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
        regions = [target["boxes"].to(batch.tensors.dtype) for target in _targets(images)]
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


# timm: backbones; a classifier's loss is cross-entropy, a pyramid's here is the size of its maps


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


# segmentation_models_pytorch


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


# effdet


@family("effdet-d0", "effdet")
def _effdet() -> Subject:
    """``Conv2dSame`` again, weighted feature fusion, and head convolutions that all levels share."""
    import effdet

    options = {"image_size": (128, 128), "pretrained": False, "pretrained_backbone": False, "num_classes": CLASSES}
    model = effdet.create_model("tf_efficientdet_d0", bench_task="train", bench_labeler=True, **options)

    def loss(bench: nn.Module, images: Tensor) -> Tensor:
        targets = _targets(images)
        boxes = [target["boxes"][:, [1, 0, 3, 2]] for target in targets]  # top, left, bottom, right
        labels = [target["labels"].to(images.dtype) for target in targets]
        return bench(images, {"bbox": boxes, "cls": labels})["loss"]

    def raw(bench: Any, images: Tensor) -> Any:
        return bench.model(images)

    return Subject(model, loss, raw, raw, size=128)
