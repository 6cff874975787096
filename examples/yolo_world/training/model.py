"""Build or load ultralytics' YOLO-World, and turn its outputs into boxes.

ultralytics is licensed AGPL-3.0. It is imported here, inside functions, and nowhere in ``convpeft`` itself.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
SCALES = ("n", "s", "l")


class WeightsError(ValueError):
    """A weights file that is missing or holds no YOLO-World model."""


def prepare_ultralytics() -> None:
    """Set ultralytics' switches, before it is imported: stay offline, install nothing, leave the user's settings alone."""
    os.environ.setdefault("YOLO_OFFLINE", "1")
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="convpeft-ultralytics-")


def loss_gains() -> Any:
    """Return the arguments that ultralytics' detection loss reads from ``model.args``."""
    prepare_ultralytics()
    from ultralytics.cfg import get_cfg

    return get_cfg(overrides=GAINS)


def build_world_model(scale: str, *, class_count: int = 4, seed: int = 0) -> nn.Module:
    """Return an untrained YOLO-World-v2 of a scale, ready for ``model.loss(batch)``.

    The contrastive heads of ultralytics start at a bias of -10 and a scale of 1/e, which suits long training on
    large data; a short one does not get off that floor. Here they start at a prior of about 1 %.

    Args:
        scale: ``n``, ``s`` or ``l``.
        class_count: sets the width of the head as ultralytics does it (no more than 64 changes nothing).
        seed: of the random weights.
    """
    prepare_ultralytics()
    from ultralytics.nn.modules.block import BNContrastiveHead
    from ultralytics.nn.tasks import WorldModel

    torch.manual_seed(seed)
    with _heads_as_at_first():
        model = WorldModel(f"yolov8{scale}-worldv2.yaml", nc=class_count, verbose=False)
    for module in model.modules():
        if isinstance(module, BNContrastiveHead):
            nn.init.constant_(module.bias, -5.0)
            nn.init.constant_(module.logit_scale, 0.0)
    model.args = loss_gains()
    return model


@contextmanager
def _heads_as_at_first() -> Iterator[None]:
    """Build heads as in a fresh process inside the context.

    Building a YOLOv8 sets ``Detect.legacy`` for all heads that are built after it; a WorldModel then draws more random
    numbers, and the same seed gives another base.
    """
    from ultralytics.nn.modules.head import Detect

    before, Detect.legacy = Detect.legacy, False
    try:
        yield
    finally:
        Detect.legacy = before


def load_world_model(path: Path) -> nn.Module:
    """Return the YOLO-World model of an ultralytics weights file, in float32, ready for ``model.loss(batch)``.

    Such a file is a pickle and can run code when it is read: load only files you trust.

    Raises:
        WeightsError: if the file is missing or unreadable, or the model in it is none that takes text features.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}. Download it yourself; the demo never does.")
    if path.suffix != ".pt":
        raise WeightsError(f"{path} does not end in .pt; ultralytics' weights do.")
    prepare_ultralytics()
    from ultralytics import YOLOWorld
    from ultralytics.nn.tasks import WorldModel

    try:
        model = YOLOWorld(str(path)).model
    except Exception as error:  # ultralytics raises whatever unpickling raises
        raise WeightsError(f"ultralytics cannot read {path}: {error}") from error
    if not isinstance(model, WorldModel):
        raise WeightsError(f"{path} holds {type(model).__name__}, not a YOLO-World model such as yolov8s-worldv2.pt.")
    model = model.float()
    model.args = loss_gains()
    return unfreeze_all(model)


def unfreeze_all(model: nn.Module) -> nn.Module:
    """Let every parameter train but the head's DFL: its numbers 0 to 15 are a fixed sum, written as a convolution."""
    detector: Any = model.requires_grad_(True)
    detector.model[-1].dfl.requires_grad_(False)
    return model


def use_classes(model: nn.Module, texts: Tensor) -> nn.Module:
    """Make the model tell the classes of ``texts``, ``(1, number of classes, 512)``, apart; in place."""
    device = next(model.parameters()).device
    model.txt_feats = texts.to(device)
    model.model[-1].nc = texts.shape[1]
    model.criterion = None
    return model


def copy_model(model: nn.Module) -> nn.Module:
    """Return an independent copy, without the loss object that belongs to the old one."""
    model.criterion = None
    return copy.deepcopy(model)


def decode(
    model: nn.Module, images: Tensor, *, confidence: float = 0.005, overlap: float = 0.6, limit: int = 100
) -> list[Tensor]:
    """Return the boxes of each image after non-maximum suppression: ``(n, 6)``, x1 y1 x2 y2 confidence class.

    The model must be in eval mode. Coordinates are pixels of ``images``. ultralytics' suppression stops when a
    time limit is over; it is lifted here, so that a slow machine gives the same boxes.
    """
    from ultralytics.utils.nms import non_max_suppression

    with torch.no_grad():
        output = model(images)
    found: Sequence[Tensor] = non_max_suppression(
        output,
        conf_thres=confidence,
        iou_thres=overlap,
        max_det=limit,
        nc=model.model[-1].nc,
        max_time_img=3600.0,
        multi_label=True,
    )
    return list(found)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters: (those that train, all)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def all_parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups of all trainable parameters; vectors and scalars (norms, biases) have no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def state_bytes(model: nn.Module) -> int:
    """Return the size of a safetensors file with the model's whole state."""
    return len(safetensors_bytes({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}))
