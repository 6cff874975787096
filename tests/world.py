"""Real YOLO-World models, built offline, with specs for them: what the tests on ultralytics share."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import convpeft
from benchmarks.detectors.comparisons import tensors
from convpeft.adapters import Adapter
from examples.yolo_world.training import model as worlds

CLASSES = 3
NECK = "model.{12,15,18,21}.cv2.conv"
LAST = ["model.22.cv2.*.2", "model.22.cv3.*.2"]
MERGEABLE = {
    "rules": [
        {"match": "model.22.dfl.**", "kind": "leave"},
        {"match": NECK, "kind": "rep_mona", "rank": 4, "kernel_sizes": [3, 5, 7], "lr_mult": 1.4},
        {"match": ["model.[0-9].**.conv", "model.22.cv3.*.*.conv"], "kind": "lora", "rank": 4, "alpha": 8},
        {"match": "model.{12,15,18,21}.attn.gl", "kind": "lora", "rank": 2},
        {"match": "model.18", "kind": "lora", "place": "output", "rank": 4},
    ],
    "unfreeze": [{"match": LAST, "lr_mult": 0.5}],
}
MIXED = {
    **MERGEABLE,
    "rules": [*MERGEABLE["rules"], {"match": "model.{12,15,21}", "kind": "bottleneck", "reduction": 4}],
}
OTHER = {
    "rules": [{"match": "model.22.cv2.*.*.conv", "kind": "lora", "rank": 2}],
    "unfreeze": ["model.22.cv4.**", "model.22.cv3.0.2", "model.16.conv"],
    "norm": "adapt",
}


@functools.cache
def _built(scale: str, seed: int) -> nn.Module:
    model = worlds.build_world_model(scale, class_count=CLASSES, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return worlds.use_classes(model, torch.randn(1, CLASSES, 512, generator=generator)).eval()


def world(scale: str = "n", seed: int = 0) -> Any:
    """Return a fresh copy of a YOLO-World-v2 with non-trivial norm statistics, in eval mode."""
    return copy.deepcopy(_built(scale, seed))


def pictures(dtype: torch.dtype = torch.float32, size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a training batch as ultralytics' loss takes it."""
    generator = torch.Generator().manual_seed(2)
    return {
        "img": pictures(dtype),
        "cls": torch.tensor([[0.0], [CLASSES - 1.0], [1.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.4, 0.2, 0.2], [0.6, 0.5, 0.5, 0.5]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "txt_feats": torch.randn(2, CLASSES, 512, generator=generator).to(dtype),
    }


def loss_of(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    losses, _ = model.loss(batch(dtype))
    return losses.sum()


def train(model: Any, steps: int = 1, lr: float = 1e-3) -> Any:
    """Take real training steps with ultralytics' loss, and leave the model in training mode."""
    model.train()
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=lr))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    model.criterion = None
    return model


def moved(model: Any, seed: int = 3) -> Any:
    """Move everything the active adapter may train off its start, by a little, as training would; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.05 * noise.to(parameter.dtype))
    return model


def outputs(model: Any, x: Tensor | None = None) -> list[Tensor]:
    """Return every tensor that the model gives in eval mode: boxes, and the maps they come from; of one picture, or x."""
    x = pictures(next(model.parameters()).dtype)[:1] if x is None else x
    with torch.no_grad():
        return tensors(model(x))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def layer_outputs(model: Any) -> dict[str, Tensor]:
    """Return what each of the user's modules gives on the pictures, by name, of those that give one tensor."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, output.clone())  # the activations of ultralytics work in place

        return hook

    ours = (Adapter, nn.ModuleDict)
    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if not isinstance(module, ours) and not {"convpeft", "beside", "after"} & set(name.split("."))
    ]
    outputs(model)
    for handle in handles:
        handle.remove()
    return found
