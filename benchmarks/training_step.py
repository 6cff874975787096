"""Measure a training step with adapters next to full fine-tuning: its time, and what it keeps for backward.

Forward, loss and backward of YOLO-World-v2 (ultralytics' model and loss, random weights, one random batch), all cases
side by side. Needs ``convpeft[example]``; run it as ``python -m benchmarks.training_step``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convpeft
from examples.yolo_world.model import build_world_model, use_classes
from examples.yolo_world.texts import features_from_name

from .runner import Case, report, side_by_side

CLASSES = ("scratch", "stain", "dent", "hole")
NOT_DFL = "!model.22.dfl.**"
NECK_AND_HEAD = ["model.{12,15,18,21,22}.**", NOT_DFL]
SPECS: dict[str, dict[str, Any]] = {
    "LoRA r=8, every conv": {"rules": [{"match": ["**", NOT_DFL], "kind": "lora", "rank": 8, "only": ["Conv2d"]}]},
    "LoRA r=8, neck and head": {"rules": [{"match": NECK_AND_HEAD, "kind": "lora", "rank": 8, "only": ["Conv2d"]}]},
    "Rep-MoNA r=8 3/5/7, neck and head": {
        "rules": [{"match": NECK_AND_HEAD, "kind": "rep_mona", "rank": 8, "only": ["Conv2d"]}]
    },
}


def batch_of(images: int, size: int, device: str) -> dict[str, Tensor]:
    """Return a random batch as ultralytics' loss takes it, four boxes an image."""
    generator = torch.Generator().manual_seed(0)
    boxes = 0.2 + 0.3 * torch.rand(4 * images, 4, generator=generator)
    texts = torch.stack([features_from_name(name) for name in CLASSES])
    batch = {
        "img": torch.rand(images, 3, size, size, generator=generator),
        "cls": torch.randint(len(CLASSES), (4 * images, 1), generator=generator).float(),
        "bboxes": boxes,
        "batch_idx": torch.arange(images).repeat_interleave(4).float(),
        "txt_feats": texts.expand(images, -1, -1).contiguous(),
    }
    return {key: value.to(device) for key, value in batch.items()}


def case_of(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Case:
    """Return the case of one forward and backward pass of a model in training mode."""
    model.train()

    def step() -> None:
        losses, _ = model(batch)
        losses.sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return Case(name, step, model)


def cases(scale: str, batch: dict[str, Tensor], device: str) -> list[Case]:
    """Return full fine-tuning, the head alone, and one case for each spec, on copies of one base."""
    texts = batch["txt_feats"][:1].cpu()
    base = use_classes(build_world_model(scale, class_count=len(CLASSES)), texts).to(device)
    head = copy.deepcopy(base)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name.startswith("model.22.") and ".dfl." not in name)
    found = [case_of("full fine-tuning", copy.deepcopy(base), batch), case_of("head alone", head, batch)]
    for name, spec in SPECS.items():
        model = copy.deepcopy(base)
        convpeft.inject(model, spec)
        found.append(case_of(name, model, batch))
    return found


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--scale", default="s", choices=("n", "s", "l"))
    parser.add_argument("--images", type=int, default=4, help="in a batch")
    parser.add_argument("--size", type=int, default=256, help="of an image, pixels, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None, help="write the results here as well")
    options = parser.parse_args()
    batch = batch_of(options.images, options.size, options.device)
    results = side_by_side(cases(options.scale, batch, options.device), rounds=options.rounds)
    report(results, {key: str(value) for key, value in vars(options).items()}, options.json)


if __name__ == "__main__":
    main()
