"""transformers: the DETR family, from small configurations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .subjects import CLASSES, LABELS, Subject, boxes, centred, family

DETECTOR = {
    "num_labels": CLASSES,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
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
LEVELS = {"out_features": ["stage2", "stage3", "stage4"]}
HGNET = {
    **STAGES,
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 12, 16],
    "stage_out_channels": [16, 24, 32, 40],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "use_learnable_affine_block": True,
    "out_indices": [2, 3, 4],
}
TWINS = ("class_embed.**", "bbox_embed.**")  # their weights are the decoder's heads', and only those are called


def _loss(model: Any, images: Tensor) -> Tensor:
    target = {"class_labels": LABELS - 1, "boxes": centred(boxes()).to(images)}
    return model(pixel_values=images, labels=[target] * len(images)).loss


def _raw(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    found = model(images)
    return found.logits, found.pred_boxes


def _subject(kind: str, backbone: str, small: dict[str, Any], config: dict[str, Any], **facts: Any) -> Subject:
    import transformers

    body = getattr(transformers, f"{backbone}Config")(**small)
    settings = getattr(transformers, f"{kind}Config")(backbone_config=body, **config)
    model: nn.Module = getattr(transformers, f"{kind}ForObjectDetection")(settings)
    return Subject(model, _loss, _raw, **facts)


@family("transformers-rt-detr", "transformers", "scipy")
def _rt_detr() -> Subject:
    body = {**STAGES, **LEVELS, "layer_type": "basic", "embedding_size": 16}
    return _subject("RTDetr", "RTDetrResNet", body, HYBRID)


@family("transformers-rt-detr-v2", "transformers", "scipy")
def _rt_detr_v2() -> Subject:
    return _subject("RTDetrV2", "RTDetrResNet", {**STAGES, **LEVELS}, HYBRID, idle=TWINS, unlearned=TWINS)


@family("transformers-d-fine", "transformers", "scipy")
def _d_fine() -> Subject:
    """Inference reads the last layer's heads only."""
    idle = (*TWINS, "model.decoder.class_embed.0", "model.decoder.lqe_layers.0.**")
    return _subject("DFine", "HGNetV2", HGNET, HYBRID, idle=idle, unlearned=TWINS)


@family("transformers-detr", "transformers", "scipy")
def _detr() -> Subject:
    """Return DETR, whose first decoder layer attends over queries that are all zero."""
    still = ("model.decoder.layers.0.self_attn.*",)
    return _subject("Detr", "ResNet", {**STAGES, "out_features": ["stage4"]}, {**DETECTOR, **ENCODER}, still=still)
