"""A detector in miniature with ultralytics' interface, and data for it: trainings that take milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.yolo_world.training.parallel import make_accelerator
from examples.yolo_world.training.trainer import Trainer, TrainSettings

TEXTS = torch.zeros(1, 2, 512)


class Toy(nn.Module):
    """Learns the mean colour of an image; ``criterion`` and ``init_criterion`` as ultralytics' models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion: Any = None
        self.hidden, self.last, self.drop = nn.Linear(3, 8), nn.Linear(8, 3), nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(8)

    def init_criterion(self) -> Any:
        return lambda found, batch: (((found - batch["img"].mean((2, 3))) ** 2).sum(1, keepdim=True), {})

    def forward(self, images: Tensor, txt_feats: Tensor | None = None) -> Tensor:
        return self.last(self.drop(self.norm(torch.tanh(self.hidden(images.mean((2, 3)))))))


class Colours:
    """Seven small images, each with noise drawn anew every time."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.full((3, 4, 4), index / 7) + 0.1 * torch.rand(3, 1, 1)
        return {"img": image, "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4)}


def toy_trainer(
    *, lr: float = 1e-2, extra_loss: Any = None, guard: Any = None, seed: int = 0, **options: Any
) -> Trainer:
    """Return a trainer of a fresh toy; ``options`` go to ``TrainSettings``."""
    torch.manual_seed(seed)
    model = Toy()
    settings = TrainSettings(**{"steps": 12, "batch_size": 3, "accumulation": 2, "seed": seed, **options})
    groups = [{"params": list(model.parameters()), "lr": lr, "weight_decay": 0.01, "name": "all"}]
    return Trainer(
        model, groups, Colours(), TEXTS, settings, accelerator=make_accelerator("cpu", "no"), guard=guard,
        extra_loss=extra_loss, say=lambda text: None,
    )  # fmt: skip


def values(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of everything a trainer changes."""
    return {name: tensor.detach().clone() for name, tensor in trainer.tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether two models' tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tiny_world(folder: Path) -> tuple[Path, Path]:
    """Write a small generated data set and the weights of an untrained YOLO-World-n; return both paths."""
    from examples.yolo_world.data.generate import generate
    from examples.yolo_world.training.model import build_world_model

    generate(folder / "parts", ["mesh"], images=4, good=2, size=64)
    torch.save({"model": build_world_model("n"), "train_args": {}}, folder / "tiny-worldv2.pt")
    return folder / "parts", folder / "tiny-worldv2.pt"
