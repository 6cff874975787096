"""Detectors of ultralytics, transformers and libreyolo, built offline from their configurations, small and random.

Each entry gives a fresh model, how it is called, its own training loss, the shortest spec for LoRA on every adaptable
layer, and which layers take no part in inference or in the loss. ultralytics is licensed AGPL-3.0: only tests import it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
EVERY = ("**",)


def image(size: int, count: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``(count, 3, size, size)`` random pictures, always the same."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


@dataclass(frozen=True)
class Entry:
    """One detector.

    Attributes:
        name: readable, ``library/model``.
        package: what must be installed.
        build: returns a fresh model in eval mode with random weights.
        loss: the model's own training loss on a batch of two pictures.
        match: patterns that reach every adaptable layer but those a parent reads itself, or that must stay as they are.
        bare: names of Conv2d and Linear layers that ``match`` leaves out (glob patterns).
        idle: adapters that ``check`` names: their layers take no part in inference (glob patterns).
        unlearned: adapters that get no gradient: their layers take no part in the loss (glob patterns).
        still: adapters whose gradient is zero on a fresh model, for the reason said beside the entry (glob patterns).
        size: of the square pictures.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    match: tuple[str, ...] = EVERY
    bare: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    unlearned: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    size: int = 64

    @property
    def spec(self) -> dict[str, Any]:
        """LoRA of rank 2 on every adaptable layer, as one rule."""
        return {"rules": [{"match": list(self.match), "kind": "lora", "rank": 2, "only": ["Conv2d", "Linear"]}]}


# ultralytics


def _ultralytics(config: Any, family: str = "DetectionModel") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn import tasks

        model = getattr(tasks, family)(config, nc=CLASSES, verbose=False)
        model.args, model.nc = get_cfg(), CLASSES
        if family == "WorldModel":
            model.txt_feats = torch.randn(1, CLASSES, 512, generator=torch.Generator().manual_seed(2))
            model.model[-1].nc = CLASSES
        return model.eval()

    return build


def _ultralytics_loss(model: Any, pictures: Tensor) -> Tensor:
    batch = {
        "img": pictures,
        "cls": torch.tensor([[0.0], [CLASSES - 1.0], [1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.4, 0.2, 0.2], [0.6, 0.5, 0.5, 0.5]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
    }
    if hasattr(model, "txt_feats"):
        texts = torch.randn(2, CLASSES, 512, generator=torch.Generator().manual_seed(3))
        batch["txt_feats"] = texts.to(pictures.dtype)
    loss, _ = model.loss(batch)
    model.criterion = None
    return loss.sum()


RTDETR = {
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


# transformers

DETECTOR = {
    "num_labels": CLASSES,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
}
HYBRID = {
    **DETECTOR,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 40],
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2,
    "num_denoising": 6,
}
STAGES = {"embedding_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40]}


def _transformers(family: str, backbone: str, small: dict[str, Any], config: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        body = getattr(transformers, f"{backbone}Config")(**small)
        model = getattr(transformers, f"{family}ForObjectDetection")
        return model(getattr(transformers, f"{family}Config")(backbone_config=body, **config)).eval()

    return build


def _transformers_loss(model: Any, pictures: Tensor) -> Tensor:
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.4, 0.2, 0.2]], dtype=pictures.dtype)
    labels = [{"class_labels": torch.tensor([0, CLASSES - 1]), "boxes": boxes} for _ in pictures]
    return model(pixel_values=pictures, labels=labels).loss


HGNET = {
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 12, 16],
    "stage_out_channels": [16, 24, 32, 40],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "embedding_size": 8,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 24, 32, 40],
    "use_learnable_affine_block": True,
    "out_indices": [2, 3, 4],
}


# libreyolo


def _libreyolo(module: str, family: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from importlib import import_module

        return getattr(import_module(f"libreyolo.models.{module}.nn"), family)(*args, **options).eval()

    return build


def _pixel_boxes(pictures: Tensor) -> Tensor:
    """Return two boxes for each picture: class, centre, width and height, in pixels."""
    side = pictures.shape[-1]
    boxes = [
        [0.0, 0.5 * side, 0.5 * side, 0.4 * side, 0.3 * side],
        [2.0, 0.3 * side, 0.4 * side, 0.5 * side, 0.5 * side],
    ]
    return torch.tensor([boxes] * len(pictures), dtype=pictures.dtype)


def _yolox_loss(model: Any, pictures: Tensor) -> Tensor:
    return model(pictures, targets=_pixel_boxes(pictures))["total_loss"]


def _yolo9_loss(model: Any, pictures: Tensor) -> Tensor:
    boxes = torch.tensor([[0.0, 0.2, 0.2, 0.7, 0.8], [2.0, 0.1, 0.3, 0.5, 0.9]], dtype=pictures.dtype)
    return model(pictures, targets=boxes.expand(len(pictures), -1, -1))["total_loss"]


def _corner_boxes(pictures: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    boxes = _pixel_boxes(pictures)
    centre, half = boxes[..., 1:3], boxes[..., 3:5] / 2
    return list(torch.cat((centre - half, centre + half), -1)), list(boxes[..., 0].long())


def _rtmdet_loss(model: Any, pictures: Tensor) -> Tensor:
    from libreyolo.models.rtmdet.loss import RTMDetLoss

    return RTMDetLoss(CLASSES)(*model(pictures), *_corner_boxes(pictures))["total_loss"]


def _picodet_loss(model: Any, pictures: Tensor) -> Tensor:
    from libreyolo.models.picodet.loss import PICODETLoss

    return PICODETLoss(CLASSES)(*model(pictures), *_corner_boxes(pictures))["total_loss"]


DFL = ("**", "!**.dfl.**")  # its numbers 0 to 15 are a fixed sum, written as a convolution
DFL_BARE = ("**.dfl.**",)
TWINS = ("class_embed.**", "bbox_embed.**")  # transformers ties their weights to the decoder's and calls only those
LEVELS = {"out_features": ["stage2", "stage3", "stage4"]}
BASIC = {**STAGES, **LEVELS, "layer_type": "basic", "embedding_size": 16}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}


def _from_ultralytics(name: str, config: Any, family: str = "DetectionModel", **more: Any) -> Entry:
    return Entry(f"ultralytics/{name}", "ultralytics", _ultralytics(config, family), _ultralytics_loss, **more)


def _from_transformers(name: str, build: Callable[[], nn.Module], **more: Any) -> Entry:
    return Entry(f"transformers/{name}", "transformers", build, _transformers_loss, **more)


ZOO = [
    _from_ultralytics("yolo-world", "yolov8n-world.yaml", "WorldModel", match=DFL, bare=DFL_BARE),
    _from_ultralytics("yolo11", "yolo11n.yaml", match=DFL, bare=DFL_BARE),
    _from_ultralytics("yolo26", "yolo26n.yaml"),
    _from_ultralytics("yolov10", "yolov10n.yaml", match=DFL, bare=DFL_BARE),
    _from_ultralytics(  # its nn.MultiheadAttention reads out_proj.weight itself; inference reads the last scores only
        "rt-detr",
        RTDETR,
        "RTDETRDetectionModel",
        match=("**", "!**.out_proj"),
        bare=("**.out_proj",),
        idle=("**.dec_score_head.0",),
    ),
    _from_transformers("rt-detr", _transformers("RTDetr", "RTDetrResNet", BASIC, HYBRID)),
    _from_transformers(
        "rt-detr-v2",
        _transformers("RTDetrV2", "RTDetrResNet", {**STAGES, **LEVELS}, HYBRID),
        idle=TWINS,
        unlearned=TWINS,
    ),
    _from_transformers(
        "d-fine",
        _transformers("DFine", "HGNetV2", HGNET, HYBRID),
        idle=(*TWINS, "model.decoder.class_embed.0", "model.decoder.lqe_layers.0.**"),
        unlearned=TWINS,
    ),
    _from_transformers(  # the first decoder layer attends over queries that are all zero
        "detr",
        _transformers("Detr", "ResNet", {**STAGES, "out_features": ["stage4"]}, {**DETECTOR, **ENCODER}),
        still=("model.decoder.layers.0.self_attn.*",),
    ),
    Entry("libreyolo/yolox", "libreyolo", _libreyolo("yolox", "LibreYOLOXModel", "n", CLASSES), _yolox_loss),
    Entry("libreyolo/yolo9", "libreyolo", _libreyolo("yolo9", "LibreYOLO9Model", "t", nb_classes=CLASSES), _yolo9_loss),
    Entry("libreyolo/rtmdet", "libreyolo", _libreyolo("rtmdet", "LibreRTMDetModel", "t", CLASSES), _rtmdet_loss),
    Entry("libreyolo/picodet", "libreyolo", _libreyolo("picodet", "LibrePICODETModel", "s", CLASSES), _picodet_loss),
]
