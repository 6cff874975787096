"""Short trainings of a real YOLO-World in float64, in one process or under torchrun; results go to files.

python -m torch.distributed.run --nproc-per-node 2 -m tests.examples.training.distributed_runs DATA OUT NAME [NAME ...]
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import convpeft
from examples.yolo_world.data.datasets import open_dataset
from examples.yolo_world.data.texts import load_class_features
from examples.yolo_world.training.guard import GuardSettings
from examples.yolo_world.training.model import build_world_model, copy_model
from examples.yolo_world.training.parallel import full, make_accelerator, shard
from examples.yolo_world.training.trainer import Trainer, TrainSettings, moving_tensors

STEPS, GLOBAL_BATCH = 4, 2
SPEC = {
    "rules": [
        {"match": "model.{12,15}.cv2.conv", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3], "lr_mult": 2.0},
        {"match": "model.{4,18}.cv2.conv", "kind": "lora", "rank": 2},
    ],
    "unfreeze": [{"match": ["model.22.cv2.*.2", "model.22.cv3.*.2", "model.22.cv4.*"]}],
}
"""``cv4`` holds scalars that train, which FSDP2 cannot shard."""


class Doubles:
    """A data set in float64 whose first item of each pair has no box: one of two processes finds no object."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value.double() for key, value in self.data[index].items()}


def poison(steps: set[int], rank: int) -> Any:
    """Return an extra loss that is not a number in one process, in chosen forward passes of the training."""
    count = -1

    def extra(model: nn.Module) -> torch.Tensor:
        nonlocal count
        count += 1
        zero = torch.zeros(())
        return zero * math.nan if count in steps and rank == 0 else zero + convpeft.auxiliary_loss(model)

    return extra


def train(name: str, data: Path, out: Path, accelerator: Any) -> None:
    """Train as ``name`` says, and write losses and tensors to ``out/<name>.{json,safetensors}`` from the first process."""
    processes = accelerator.num_processes
    splits = open_dataset(data, size=64)
    texts = load_class_features(splits.texts, use_clip=False).of(splits.classes)
    torch.set_default_dtype(torch.float32)
    model = build_world_model("n").double()
    torch.set_default_dtype(torch.float64)  # ultralytics' losses are added up in the default dtype
    torch.manual_seed(1)
    convpeft.inject(model, SPEC, name="two")
    model.txt_feats = texts.double()
    model.model[-1].nc = len(splits.classes)
    if name == "fsdp":
        whole = copy_model(model)
        shard(model)
    settings = TrainSettings(
        STEPS, GLOBAL_BATCH // processes, 2 if "accumulated" in name else 1, clip=1.0, ema=0.9,
        checkpoint_every=2, evaluations=1, parallel="fsdp" if name == "fsdp" else "ddp",
    )  # fmt: skip
    trainer = Trainer(
        model, convpeft.param_groups(model, lr=1e-3, weight_decay=0.05), Doubles(splits.train), texts, settings,
        accelerator=accelerator, guard=GuardSettings(streak=2),
        extra_loss=poison({1, 2} if "poisoned" in name else set(), accelerator.process_index), say=lambda text: None,
    )  # fmt: skip
    if name == "fsdp":  # half of it, then the rest in a trainer that begins from the checkpoint
        trainer.run(out / "fsdp.checkpoint", until=STEPS // 2)
        accelerator.wait_for_everyone()  # the first process writes the file, every one reads it
        trainer.resume(out / "fsdp.checkpoint")
        trainer.optimizer.zero_grad()
    trainer.run()
    tensors = {key: full(tensor.detach()).cpu().clone().contiguous() for key, tensor in trainer.tensors.items()}
    averages = {
        f"average {key}": full(tensor).cpu().clone().contiguous() for key, tensor in trainer.average.averages.items()
    }
    if name == "fsdp":
        with torch.no_grad():
            for key, tensor in moving_tensors(whole).items():
                tensor.copy_(tensors[key])
        model = whole
    alike = True
    if processes > 1:
        digests: list[Any] = [None] * processes
        torch.distributed.all_gather_object(digests, sum(float(t.double().sum()) for t in tensors.values()))
        alike = len(set(digests)) == 1
    if accelerator.is_main_process:
        save_file({**tensors, **averages}, out / f"{name}.safetensors")
        convpeft.save_adapter(model, out / f"{name}.adapter.safetensors")
        curves = trainer.curves
        guard = {"skipped": trainer.guard.skipped, "returns": trainer.guard.returns, "messages": curves.messages}
        content = {"losses": curves.losses, "norms": curves.norms, "guard": guard, "alike": alike}
        (out / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Run the named trainings, one after the other in the same processes."""
    torch.set_num_threads(1)
    accelerator = make_accelerator("cpu", "no")
    for name in arguments[2:]:
        train(name, Path(arguments[0]), Path(arguments[1]), accelerator)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
