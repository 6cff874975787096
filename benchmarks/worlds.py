"""What is measured: YOLO-World-v2 of ultralytics with random weights, its layers by name, its training step.

ultralytics is licensed AGPL-3.0; it is imported inside functions of the example and nowhere in ``convpeft``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.yolo_world.data.texts import features_from_name
from examples.yolo_world.training.model import build_world_model, unfreeze_all, use_classes

from .runner import Case

SCALES = ("n", "s", "m", "l")
CLASSES = ("scratch", "stain", "dent", "hole")
DFL = "model.22.dfl"  # a fixed sum, written as a convolution; nobody adapts it
NECK_AND_HEAD = ("model.12", "model.15", "model.18", "model.21", "model.22")
PLACES = {"every conv": ("",), "neck and head": NECK_AND_HEAD}
PRECISIONS = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """On what a model runs, and how.

    Attributes:
        device: ``cpu`` or ``cuda``.
        amp: a key of ``PRECISIONS``: what autocast runs convolutions in.
        compiled: let ``torch.compile`` have the network; the loss stays eager, its shapes depend on the boxes.
        seed: of weights and batch.
    """

    device: str = "cpu"
    amp: str = "off"
    compiled: bool = False
    seed: int = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that forward passes run in."""
        precision = PRECISIONS[self.amp]
        return nullcontext() if precision is None else torch.autocast(self.device, precision)


def title_of(scale: str, images: int, size: int) -> str:
    """Return what tables call a model and its batch.

    Example:
        >>> title_of("s", 4, 256)
        'YOLO-World-v2-S, 4×256²'
    """
    return f"YOLO-World-v2-{scale.upper()}, {images}×{size}²"


def base_model(scale: str, setting: Setting) -> nn.Module:
    """Return a model of a scale whose every parameter trains but DFL's, in training mode."""
    texts = torch.stack([features_from_name(name) for name in CLASSES])[None]
    model = build_world_model(scale, class_count=len(CLASSES), seed=setting.seed)
    return unfreeze_all(use_classes(model, texts).to(setting.device)).train()


def batch_of(images: int, size: int, setting: Setting) -> dict[str, Tensor]:
    """Return a random batch as ultralytics' loss takes it, four boxes an image."""
    generator = torch.Generator().manual_seed(setting.seed)
    boxes = 0.2 + 0.3 * torch.rand(4 * images, 4, generator=generator)
    texts = torch.stack([features_from_name(name) for name in CLASSES])
    batch = {
        "img": torch.rand(images, 3, size, size, generator=generator),
        "cls": torch.randint(len(CLASSES), (4 * images, 1), generator=generator).float(),
        "bboxes": boxes,
        "batch_idx": torch.arange(images).repeat_interleave(4).float(),
        "txt_feats": texts.expand(images, -1, -1).contiguous(),
    }
    return {key: value.to(setting.device) for key, value in batch.items()}


def convs_of(model: nn.Module, parts: Sequence[str] = ("",)) -> list[str]:
    """Return the names of all ``Conv2d`` within ``parts`` but DFL's, ``""`` being the whole model."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and not name.startswith(DFL)
        and any(not part or name.startswith(f"{part}.") for part in parts)
    ]


def hold_norms(model: nn.Module, held: Callable[[str], bool] = lambda name: True) -> None:
    """Keep the chosen BatchNorms in eval mode, in place, as for a frozen base; until the next ``train()``."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and held(name):
            module.eval()


def head_alone(model: nn.Module) -> nn.Module:
    """Return the model with only its head training, in place; the norms before it are held."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("model.22.") and not name.startswith(DFL))
    hold_norms(model, lambda name: not name.startswith("model.22."))
    return model


def training_case(
    name: str, model: nn.Module, batch: dict[str, Tensor], setting: Setting, beside: Sequence[nn.Module] = ()
) -> Case:
    """Return the case of one forward pass, loss and backward pass; gradients are dropped at its end.

    Args:
        name: of the case.
        model: in training mode.
        batch: as the loss takes it.
        setting: how to run it.
        beside: modules outside the model that train with it.
    """
    modules = (model, *beside)
    if setting.compiled:
        model.predict = torch.compile(model.predict, dynamic=False)

    def step() -> None:
        with setting.autocast():
            losses, _ = model(batch)
        losses.sum().backward()
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None

    return Case(name, step, modules, trains=True)


def inference_case(name: str, model: nn.Module, images: Tensor, setting: Setting, repeat: int = 1) -> Case:
    """Return the case of one forward pass in eval mode without gradients."""
    model.eval()
    run = torch.compile(model.predict, dynamic=False) if setting.compiled else model

    def step() -> None:
        with torch.no_grad(), setting.autocast():
            run(images)

    return Case(name, step, repeat=repeat)


def shaken(model: nn.Module, beside: Sequence[nn.Module] = ()) -> nn.Module:
    """Return the model with small random numbers in all that trains, in place: a stand-in for training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (model, *beside):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.01 * noise.to(parameter.device, parameter.dtype))
    return model


def another(model: nn.Module) -> nn.Module:
    """Return an independent copy."""
    return copy.deepcopy(model)
