"""One adapter on a frozen YOLO-World, from plan to merge. It shows the calls: base and data are tiny, and it learns little."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import convpeft

from .data.augment import flip_and_relight
from .data.datasets import open_dataset
from .data.generate import generate
from .data.texts import load_class_features
from .training.model import build_world_model, copy_model, use_classes
from .training.scores import predict
from .training.stream import Positions, batches

NECK = {"match": "model.{12,15,18,21}.cv2.conv", "kind": "rep_mona", "rank": 8, "kernel_sizes": [3, 5]}
BACKBONE = {"match": "model.{2,4}.**.conv", "kind": "lora", "rank": 4}
SPEC = {"rules": [NECK, BACKBONE], "unfreeze": ["model.22.cv3.*.2"]}  # the last layers of the class branch train whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, load and merge an adapter; return 0 if the loaded one gives the trained one's boxes bit for bit."""
    parser = argparse.ArgumentParser(prog="python -m examples.yolo_world quickstart", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder (default runs/quickstart)")
    out = parser.parse_args(arguments).out

    data = open_dataset(generate(out / "data", ["tile"], images=5, good=2), size=96, augmentation=flip_and_relight)
    texts = load_class_features(data.texts).of(data.classes)
    base = use_classes(build_world_model("n"), texts)  # random weights; load_world_model reads yours
    model = copy_model(base)
    print(convpeft.plan(model, SPEC))  # touches nothing
    convpeft.inject(model, SPEC, name="tile")
    optimizer = torch.optim.AdamW(convpeft.param_groups(model, lr=4e-3, weight_decay=0.05))
    model.train()
    for step, batch in enumerate(batches(data.train, texts, seed=0, positions=Positions(0, 8, batch_size=4))):
        loss = model.loss(batch)[0].sum() / len(batch["img"])  # ultralytics' own
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss:.3f}")
    file = convpeft.save_adapter(model, out / "tile.safetensors")

    fresh = copy_model(base)
    convpeft.load_adapter(fresh, file)
    trained, loaded = predict(model, data.test, texts), predict(fresh, data.test, texts)
    same = all(map(torch.equal, trained, loaded))
    print(f"{file}: {sum(map(len, loaded))} boxes, the trained model's bit for bit: {'yes' if same else 'NO'}")
    merged = convpeft.merge(fresh)  # plain layers; fresh stays as it is
    print(f"merged: {sum(map(len, predict(merged, data.test, texts)))} boxes, {len(merged.state_dict())} plain tensors")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
