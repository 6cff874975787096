"""What tests run over: layer geometries, adapter kinds with options, dtypes; all with readable ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

import convpeft
from benchmarks.detectors.comparisons import assert_relative, bits, same_bits  # noqa: F401 (for tests)
from convpeft.adapters.registry import adapter_class

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class OwnConstructorConv(nn.Conv2d):
    """A Conv2d subclass nobody else can construct, as detectron's are."""

    def __init__(self, width: int, *, depth_first: bool) -> None:
        super().__init__(width, width + 2 * depth_first, 3, padding=1)
        self.depth_first = depth_first


@dataclass(frozen=True)
class Case:
    """A layer, how to build it, and an input it takes."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 4, 9, 8)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64).to(dtype)


def conv(name: str, *arguments: Any, **options: Any) -> Case:
    """Return a Conv2d case; 4 input channels, 6 output channels unless given."""
    return Case(name, lambda: nn.Conv2d(*((4, 6, *arguments) if len(arguments) < 3 else arguments), **options))


CONVS = [
    conv("1x1", 1),
    conv("1x1-no-bias", 1, bias=False),
    conv("1x1-stride2", 1, stride=2),
    conv("1x1-padding1", 1, padding=1),
    conv("3x3", 3, padding=1),
    conv("3x3-no-bias", 3, padding=1, bias=False),
    conv("1x5", (1, 5), padding=(0, 2)),
    conv("5x3-unpadded", (5, 3)),
    conv("2x2", 2),
    conv("2x2-stride2", 2, stride=2),
    conv("4x4-padding1", 4, padding=1),
    conv("stride2", 3, stride=2, padding=1),
    conv("stride2-1", 3, stride=(2, 1), padding=1),
    conv("dilation2", 3, dilation=2, padding=2),
    conv("dilation1-2", 3, dilation=(1, 2), padding=1),
    conv("padding0", 3),
    conv("padding-over-kernel", 3, padding=4),
    conv("padding-per-axis", 3, padding=(0, 2), bias=False),
    conv("same", 3, padding="same"),
    conv("same-even", (2, 4), padding="same"),
    conv("same-dilated", 3, padding="same", dilation=(2, 1), padding_mode="reflect"),
    conv("valid", 3, padding="valid"),
    conv("reflect", 3, padding=1, padding_mode="reflect"),
    conv("reflect-stride2", 5, padding=2, stride=2, padding_mode="reflect", bias=False),
    conv("replicate", 3, padding=(2, 1), padding_mode="replicate"),
    conv("circular", 3, padding=1, dilation=(1, 1), padding_mode="circular"),
    conv("circular-even", 4, padding=2, padding_mode="circular"),
    conv("circular-even-dilated", (2, 1), dilation=(2, 1), padding=(1, 0), padding_mode="circular"),
    conv("groups2", 3, padding=1, groups=2),
    conv("groups2-reflect-stride2", 3, padding=1, stride=2, groups=2, padding_mode="reflect", bias=False),
    conv("depthwise", 4, 4, 3, padding=1, groups=4),
    conv("depthwise-multiplier2", 4, 8, 3, padding=1, groups=4, bias=False),
    Case("tf-same", lambda: Conv2dSame(4, 6, 3)),
    Case("tf-same-stride2", lambda: Conv2dSame(4, 6, 3, stride=2, bias=False)),
    Case("tf-same-1x1-stride2", lambda: Conv2dSame(4, 6, 1, stride=2)),
    Case("own-constructor", lambda: OwnConstructorConv(4, depth_first=True)),
]
LINEARS = [
    Case("linear", lambda: nn.Linear(4, 6), (3, 4)),
    Case("linear-tokens-no-bias", lambda: nn.Linear(4, 6, bias=False), (2, 5, 4)),
]


def transposed(name: str, *arguments: Any, **options: Any) -> Case:
    """Return a ConvTranspose2d case; 4 input channels, 6 output channels."""
    return Case(f"transposed-{name}", lambda: nn.ConvTranspose2d(4, 6, *arguments, **options), (2, 4, 5, 4))


TRANSPOSED = [
    transposed("2x2-stride2", 2, stride=2),
    transposed("3x3-stride2-output-padding", 3, stride=2, padding=1, output_padding=1),
    transposed("3x2-stride2-1", (3, 2), stride=(2, 1), padding=(0, 1), bias=False),
    transposed("stride-over-kernel", (1, 2), stride=(2, 3), output_padding=(1, 0)),
    transposed("dilated", (2, 3), stride=(1, 3), dilation=(2, 1), padding=(1, 0), output_padding=(1, 2)),
    transposed("groups2", 4, stride=2, padding=1, groups=2),
    Case(
        "transposed-depthwise-multiplier2",
        lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=(0, 1), groups=4, bias=False),
        (2, 4, 5, 4),
    ),
]
LAYERS = CONVS + LINEARS + TRANSPOSED
CASES = {case.name: case for case in LAYERS}


@dataclass(frozen=True)
class Variant:
    """A kind with options, at one place."""

    kind: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.kind, self.place, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def rule(self) -> dict[str, Any]:
        return {"match": "layer", "kind": self.kind, "place": self.place, **self.options}

    @property
    def merges(self) -> bool:
        return adapter_class(self.kind).merge_refusal is None

    def serves(self, case: Case) -> bool:
        if case in TRANSPOSED and self.kind != "lora":  # lora alone is parallel there; an output is like any other
            return self.place == "output" and case is TRANSPOSED[0]
        return not (case in LINEARS and (self.kind in IMAGE_KINDS or self.options.get("norm") == "group"))


IMAGE_KINDS = ("rep_mona", "conv_lora", "hierarchical", "mona", "moe_rep_mona")  # they refuse channels-last hosts
DORA: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 3.0, "dora": True},
    {"rank": 3, "pointwise": True, "dora": True, "detach_norm": False},
]  # parallel only
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rank": 4, "alpha": 3.0},
        {"rank": 3, "rslora": True, "pointwise": True},
        *DORA,
        {"rank": 3, "bias": True},
    ],
    "rep_mona": [{"rank": 4, "kernel_sizes": [3, 5]}, {"rank": 2, "kernel_sizes": [1, 7], "branch_norm": True}],
    "bottleneck": [{"reduction": 2}, {"rank": 3, "norm": "group"}],
    "hierarchical": [
        {"rank": 4, "heads": 2, "conv_groups": 2, "cells": 3},
        {"reduction": 2, "attention": "window", "cells": 4, "mlp_ratio": 1.5, "recompute": False},
    ],
    "conv_lora": [
        {"rank": 4, "scales": [1, 2], "top_k": 2, "alpha": 3.0},
        {"rank": 3, "scales": [1, 2, 3], "top_k": 3, "pointwise": True, "load_balancing": 0.1},
    ],
    "mona": [{"rank": 4}, {"rank": 3, "kernel_sizes": [1, 5]}],
    "moe_rep_mona": [
        {"rank": 4, "kernel_sizes": [3, 5]},
        {"rank": 4, "kernel_sizes": [1, 3, 7], "spatial_attention": True, "top_k": 3, "squeeze": 1},
    ],
}
KINDS = convpeft.adapter_kinds()


def variants() -> Iterator[Variant]:
    """Yield every registered kind, at each of its places, with its option sets."""
    for kind in KINDS:
        for place in adapter_class(kind).places:
            for options in OPTIONS.get(kind, [{}]):
                if not (place == "output" and options.get("dora")):
                    yield Variant(kind, place, options)


VARIANTS = list(variants())
SERVED = [(case, variant) for variant in VARIANTS for case in LAYERS if variant.serves(case)]


def named(items: Any) -> Any:
    """Return ``pytest.param``s with ids from the items' names; tuples are joined."""
    rows = [item if isinstance(item, tuple) else (item,) for item in items]
    return [pytest.param(*row, id="/".join(getattr(part, "name", str(part)) for part in row)) for row in rows]


class Net(nn.Module):
    """A frozen stem, the layer, and a norm, so that there is something around the layer."""

    def __init__(self, layer: nn.Module, linear: bool) -> None:
        super().__init__()
        channels = layer.in_features if linear else layer.in_channels
        self.stem = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.layer = layer
        self.norm = nn.LayerNorm(layer.out_features) if linear else nn.BatchNorm2d(layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.stem(x)))


def net(case: Case, dtype: torch.dtype = torch.float64) -> Net:
    """Return the case's layer in a small net, in eval mode."""
    return Net(case.build(), case in LINEARS).to(dtype).eval()


def adapted(case: Case, *kinds: Variant, dtype: torch.dtype = torch.float64) -> Net:
    """Return the net with each variant injected (named a, b, ...), all active, none the identity any more."""
    model = net(case, dtype)
    names = [chr(ord("a") + number) for number in range(len(kinds))]
    for name, variant in zip(names, kinds, strict=True):
        convpeft.inject(model, {"rules": [variant.rule]}, name=name)
    convpeft.set_active(model, names)
    return randomised(model)


def randomised(model: nn.Module) -> Any:
    """Give every adapter tensor a random value, in place: nothing is the identity, no statistic is trivial."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "convpeft" in name and tensor.is_floating_point():
            with torch.no_grad():
                tensor.uniform_(0.5, 2) if name.endswith(("running_var", "scale", "gate")) else tensor.normal_(0, 0.5)
    return model
