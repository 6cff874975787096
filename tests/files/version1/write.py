"""Write one adapter file of each kind, as small as can be. The files beside this one were written on 2026-11-27 by the
convpeft that still had its modules in one folder; later code must load them bit for bit, so they are never written anew.

``python -m tests.files.version1.write FOLDER`` writes such files with today's code, for comparison.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convpeft
from convpeft import Rule, Spec

CONV, BLOCK, HEAD = "stem", "block", "head"


def base() -> nn.Module:
    """Return a float64 model whose weights need no random numbers: the same bits on every machine."""
    layers = {
        CONV: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        "norm": nn.BatchNorm2d(4),
        BLOCK: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
        HEAD: nn.Conv2d(4, 2, 3, stride=2, padding=1, groups=2),
    }
    model = nn.Sequential(OrderedDict(layers)).double().eval()
    fill(model.parameters(), 3)
    return model


def fill(tensors: Any, seed: int) -> None:
    """Give tensors small values that are exact in every dtype, in place."""
    for number, tensor in enumerate(tensors):
        values = (torch.arange(tensor.numel()) * 7 + 5 * number + seed) % 23 - 11
        tensor.data.copy_((values / 16).reshape(tensor.shape))


def image() -> Tensor:
    """Return an input of the base, ``(2, 2, 6, 5)``."""
    return (torch.arange(120, dtype=torch.float64) % 17 / 16 - 0.5).reshape(2, 2, 6, 5)


SPECS: dict[str, Spec] = {
    "lora": Spec([Rule([CONV, HEAD], "lora", rank=2, alpha=3, lr_mult=0.5)]),
    "lora_output": Spec([Rule(BLOCK, "lora", rank=1, place="output")]),
    "dora": Spec([Rule(CONV, "lora", rank=1, dora=True)]),
    "bottleneck": Spec([Rule(BLOCK, "bottleneck", reduction=2)]),
    "hierarchical": Spec([Rule(BLOCK, "hierarchical", reduction=2)]),
    "mona": Spec([Rule(BLOCK, "mona", rank=2)]),
    "rep_mona": Spec([Rule(CONV, "rep_mona", rank=2, kernel_sizes=(1, 3))]),
    "rep_mona_norm": Spec([Rule(BLOCK, "rep_mona", rank=1, kernel_sizes=(3,), branch_norm=True)]),
    "moe_rep_mona": Spec([Rule(CONV, "moe_rep_mona", rank=2, spatial_attention=True, load_balancing=0.01)]),
    "conv_lora": Spec([Rule(CONV, "conv_lora", rank=2, scales=(1, 2))]),
    "unfrozen": Spec([Rule(CONV, "lora", rank=1)], unfreeze=[HEAD], norm="adapt"),
    **{f"peft_{m}": Spec([Rule(CONV, f"peft:{m}", **options)]) for m, options in {
        "loha": {"r": 1}, "lokr": {"r": 1}, "boft": {"boft_block_size": 2}, "hra": {"r": 2}, "ia3": {}, "lora": {"r": 1},
    }.items()},
    "peft_oft": Spec([Rule(f"{BLOCK}.0", "peft:oft", r=2, oft_block_size=0)]),
}  # fmt: skip


def write(kind: str, folder: Path) -> Tensor:
    """Write the file of a kind and return what the adapted base makes of ``image()``."""
    model = base()
    convpeft.inject(model, SPECS[kind], name=kind)
    fill((p for p in model.parameters() if p.requires_grad), 1)
    fill((b for n, b in model.named_buffers() if kind in n and "running_" in n), 12)
    if kind == "unfrozen":
        model.norm.running_mean.fill_(0.25)
    convpeft.save_adapter(model, folder / f"{kind}.safetensors")
    return model.eval()(image())


def main(folder: Path) -> None:
    """Write all files, and their outputs as JSON."""
    outputs = {kind: write(kind, folder).tolist() for kind in SPECS}
    (folder / "outputs.json").write_text(json.dumps(outputs) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
