"""What the tests of the example's commands share: a small base with weights of its own, data, texts, and adapter files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import convpeft
from examples.yolo_world.data.generate import DEFECTS, generate
from examples.yolo_world.data.texts import class_texts, load_class_features
from tests.world import moved, world

SIZE = 64
CLASSES = tuple(sorted(DEFECTS))
LORA = {"rules": [{"match": "model.{2,4}.**.conv", "kind": "lora", "rank": 2}], "unfreeze": ["model.22.cv2.*.2"]}
MIXED = {
    "rules": [
        {"match": "model.{12,15}.cv2.conv", "kind": "rep_mona", "rank": 4, "kernel_sizes": [3, 5]},
        {"match": "model.16", "kind": "lora", "place": "output", "rank": 2},
        {"match": "model.2.**.conv", "kind": "lora", "rank": 2},
    ],
    "unfreeze": ["model.22.cv3.*.2", "model.6.cv1.bn"],
}
NONLINEAR = {"rules": [{"match": "model.15", "kind": "bottleneck", "reduction": 4}]}


@dataclasses.dataclass
class Place:
    """Files of one test module, and the options that name them."""

    root: Path

    @property
    def options(self) -> list[str]:
        own = {"--data": "parts", "--weights": "tiny-worldv2.pt", "--texts": "texts.safetensors"}
        named = [part for key, value in own.items() for part in (key, str(self.root / value))]
        return [*named, "--image-size", str(SIZE), "--device", "cpu", "--batch-size", "2"]

    @property
    def texts(self) -> torch.Tensor:
        """Return the classes' text features as the commands read them, ``(1, 4, 512)``."""
        return load_class_features(class_texts(list(CLASSES)), self.root / "texts.safetensors").of(CLASSES)

    def adapter(self, name: str, spec: dict[str, Any], seed: int) -> Path:
        """Write an adapter that is not the identity, once, and return its file."""
        path = self.root / f"{name}.safetensors"
        if not path.is_file():
            model = world("n")
            torch.manual_seed(seed)
            convpeft.inject(model, spec, name=name)
            convpeft.save_adapter(moved(model, seed), path)
        return path

    def spec(self, name: str, spec: dict[str, Any]) -> Path:
        """Write a spec file and return it."""
        convpeft.Spec.from_dict({"version": 1, **spec}).save(self.root / f"{name}.yaml")
        return self.root / f"{name}.yaml"


def make_place(root: Path) -> Place:
    """Write base, data and texts below a folder."""
    generate(root / "parts", ["mesh"], images=4, good=1, size=96)
    torch.save({"model": world("n"), "train_args": {}}, root / "tiny-worldv2.pt")
    generator = torch.Generator().manual_seed(5)
    save_file({name: torch.randn(512, generator=generator) for name in CLASSES}, root / "texts.safetensors")
    return Place(root)


def run(module: Any, arguments: Sequence[object]) -> int:
    """Run a command in this process and return its exit status, however it leaves."""
    try:
        return module.main([str(argument) for argument in arguments])
    except SystemExit as left:  # argparse leaves this way
        return int(left.code or 0)


def read(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))
