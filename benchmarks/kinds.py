"""convpeft's kinds on the layers of YOLO-World: beside convolutions, and on the outputs of the neck's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import convpeft

from .worlds import DFL, PLACES

NECK_BLOCKS = ["model.12", "model.15", "model.18", "model.21"]
LAST_CONVS = [f"{block}.cv2.conv" for block in NECK_BLOCKS]
BESIDE: dict[str, dict[str, Any]] = {
    "LoRA r=8": {"kind": "lora", "rank": 8},
    "LoRA r=8 with DoRA": {"kind": "lora", "rank": 8, "dora": True},
    "Rep-MoNA r=8 3/5/7": {"kind": "rep_mona", "rank": 8},
    "Conv-LoRA r=8": {"kind": "conv_lora", "rank": 8},
    "MoE-Rep-MoNA r=8": {"kind": "moe_rep_mona", "rank": 8},
    "peft:loha r=8": {"kind": "peft:loha", "r": 8},
}
ON_BLOCKS: dict[str, dict[str, Any]] = {
    "bottleneck": {"kind": "bottleneck"},
    "hierarchical": {"kind": "hierarchical"},
    "MoNA r=64": {"kind": "mona"},
    "Rep-MoNA r=16": {"kind": "rep_mona", "rank": 16, "place": "output"},
    "MoE-Rep-MoNA r=16": {"kind": "moe_rep_mona", "place": "output"},
}
USUAL = ("LoRA r=8", "LoRA r=8 with DoRA", "Rep-MoNA r=8 3/5/7")


def spec_beside(rule: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the spec of one rule on every convolution of a place, a key of ``PLACES``."""
    match = [f"{part}.**" if part else "**" for part in PLACES[place]]
    return {"rules": [{"match": [*match, f"!{DFL}.**"], "only": ["Conv2d"], **rule}]}


def spec_on_blocks(rule: dict[str, Any], names: Sequence[str] = NECK_BLOCKS) -> dict[str, Any]:
    """Return the spec of one rule on modules by name."""
    return {"rules": [{"match": list(names), **rule}]}


def lora_spec(place: str = "every conv", rank: int = 8) -> dict[str, Any]:
    """Return the spec that most scripts use: LoRA beside the convolutions of a place."""
    return spec_beside({"kind": "lora", "rank": rank}, place)


def specs(every: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the specs of the training step by name, each with the place it is compared at; the usual ones or all."""
    found = {}
    for place in PLACES:
        for name, rule in BESIDE.items():
            if every or name in USUAL:
                found[f"convpeft {name}, {place}"] = (place, spec_beside(rule, place))
    if every:
        for name, rule in ON_BLOCKS.items():
            found[f"convpeft {name}, neck blocks"] = ("neck blocks", spec_on_blocks(rule))
    return found


def injected(model: nn.Module, spec: dict[str, Any], *, lean: bool = True) -> nn.Module:
    """Return the model with adapters, in place, in training mode."""
    convpeft.inject(model, spec, lean=lean)
    return model.train()
