"""What the property tests draw: layers of seven families with an input each, and rules for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from timm.layers import Conv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from convpeft import ConvGeometry

MODES = ["zeros", "reflect", "replicate", "circular"]
KERNELS = st.tuples(st.integers(1, 7), st.integers(1, 7)) | st.integers(1, 7).map(lambda side: (side, side))
STEPS = st.tuples(st.integers(1, 4), st.integers(1, 4))
DILATIONS = st.just((1, 1)) | st.tuples(st.integers(1, 3), st.integers(1, 3))


class OwnConstructor(nn.Conv2d):
    """A subclass that nobody else can construct."""

    def __init__(self, fields: dict[str, Any], *, depth: int) -> None:
        super().__init__(**fields)
        self.depth = depth


class NormedConv(OwnConstructor):
    """A norm and an activation live inside, as detectron2 has them."""

    def __init__(self, fields: dict[str, Any], *, depth: int) -> None:
        super().__init__(fields, depth=depth)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x)).relu()


class ScaledConv(OwnConstructor):
    """Its weight is scaled on the way (equalised learning rates)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / 2, self.bias)


@dataclass(frozen=True)
class Drawn:
    """A layer, with the shape of an input it takes."""

    family: str
    layer: nn.Module
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.layer} on {self.shape}"

    def inputs(self, dtype: torch.dtype) -> Tensor:
        """Return random inputs; sixteen of them in half precision, for its budget is of the scale of the outputs.

        The largest of two outputs can be small by chance, the largest of many is not.
        """
        many = (16, *self.shape[1:]) if dtype.itemsize == 2 else self.shape
        return torch.randn(many, dtype=torch.float64).to(dtype)

    @property
    def geometry(self) -> str:
        """All that makes one geometry another, as text: the class and the bias too."""
        return f"{type(self.layer).__name__} {self.layer.bias is None} {ConvGeometry.of(self.layer)!r}"


@st.composite
def channels(draw: st.DrawFn) -> dict[str, int]:
    """Draw dense, grouped, depthwise and multiplied depthwise channels."""
    groups = draw(st.integers(1, 4))
    per_group = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)) | st.tuples(st.just(1), st.integers(1, 3)))
    return {"in_channels": groups * per_group[0], "out_channels": groups * per_group[1], "groups": groups}


@st.composite
def fields(draw: st.DrawFn, padding: st.SearchStrategy | None = None, strided: bool = True) -> dict[str, Any]:
    """Draw the arguments of a Conv2d."""
    drawn = {**draw(channels()), "kernel_size": draw(KERNELS), "dilation": draw(DILATIONS), "bias": draw(st.booleans())}
    if strided:
        drawn["stride"] = draw(STEPS)
    if padding is not None:
        drawn["padding"], drawn["padding_mode"] = draw(padding), draw(st.sampled_from(MODES))
    return drawn


PIXELS = st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.tuples(st.integers(0, 9), st.integers(0, 9))
SUBCLASSES: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "own": lambda drawn: OwnConstructor(drawn, depth=1),
    "normed": lambda drawn: NormedConv(drawn, depth=2),
    "scaled": lambda drawn: ScaledConv(drawn, depth=3),
    "weight-normed": lambda drawn: parametrizations.weight_norm(nn.Conv2d(**drawn)),
    "spectral": lambda drawn: parametrizations.spectral_norm(nn.Conv2d(**drawn)),
}


def _standardised(drawn: dict[str, Any], same: bool) -> nn.Module:
    drawn = {key: value for key, value in drawn.items() if key not in ("padding_mode", *["padding"] * same)}
    names = ("in_channels", "out_channels", "kernel_size")
    sizes = [drawn.pop(name) for name in names]
    return StdConv2dSame(*sizes, **drawn) if same else StdConv2d(*sizes, **drawn)


@st.composite
def layers(draw: st.DrawFn, family: str) -> Drawn:
    """Draw a layer of a family, and an input of at least its smallest size: often hardly larger."""
    if family == "linear":
        sizes = draw(st.tuples(st.integers(1, 12), st.integers(1, 12), st.booleans()))
        leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        return Drawn(family, nn.Linear(*sizes), (*leading, sizes[0]))
    layer = draw(_convolutions(family))
    height, width = smallest_input(layer)
    return Drawn(
        family, layer, (2, layer.in_channels, height + draw(st.integers(0, 8)), width + draw(st.integers(0, 8)))
    )


@st.composite
def _convolutions(draw: st.DrawFn, family: str) -> nn.Module:
    if family == "tf-same":
        return Conv2dSame(**draw(fields()))
    if family == "transposed":
        drawn = draw(fields())
        extra = [draw(st.integers(0, max(pair) - 1)) for pair in zip(drawn["stride"], drawn["dilation"], strict=True)]
        return nn.ConvTranspose2d(**drawn, padding=draw(st.tuples(*[st.integers(0, 3)] * 2)), output_padding=extra)
    if family == "same":
        return nn.Conv2d(**draw(fields(st.just("same"), strided=False)))
    drawn = draw(fields(PIXELS | st.just("valid")))
    if family == "subclass":
        name = draw(st.sampled_from([*SUBCLASSES, "standardised", "standardised-same"]))
        drawn = {**drawn, "in_channels": drawn["in_channels"] * (1 + (drawn["in_channels"] == drawn["groups"]))}
        if name in SUBCLASSES:
            return SUBCLASSES[name](drawn)
        return _standardised(
            {**drawn, "padding": 1 if drawn["padding"] == "valid" else drawn["padding"]}, "same" in name
        )
    return nn.Conv2d(**drawn)


def smallest_input(layer: nn.Module) -> list[int]:
    """Return the smallest height and width a convolution runs on."""
    if isinstance(layer, nn.ConvTranspose2d):
        spans = [(taps - 1) * step + 1 for taps, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        cropped = zip(spans, layer.padding, layer.output_padding, layer.stride, strict=True)
        return [1 + max(0, -((span - 2 * crop + extra - 1) // step)) for span, crop, extra, step in cropped]
    geometry = ConvGeometry.of(layer)
    least = []
    for axis in (0, 1):
        span = (geometry.kernel_size[axis] - 1) * geometry.dilation[axis] + 1
        sides = geometry.padding[2 * axis : 2 * axis + 2]
        size = 1 if geometry.dynamic_kernel else max(1, span - sum(sides))
        limit = {"reflect": max(sides) + 1, "circular": max(sides)}.get(geometry.padding_mode, 1)
        least.append(max(size, limit))
    return least


@st.composite
def rules(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """Draw a rule for ``layer``; kinds that the family takes and that merge more often than others."""
    often = ["lora"] * 8 if family in ("linear", "transposed") else ["lora", "lora", "rep_mona", "rep_mona"]
    kind = draw(st.sampled_from([*often, "rep_mona", "moe_rep_mona", "conv_lora", "peft:loha"]))
    place = "parallel"
    if kind in ("lora", "rep_mona"):
        place = draw(st.sampled_from(["parallel", "parallel", "parallel", "output"]))
    rule = {"match": "layer", "kind": kind, "place": place}
    rank = draw(st.integers(1, 5))
    if kind == "peft:loha":
        return {**rule, "r": min(rank, 2)}
    if kind == "lora":
        dora = place == "parallel" and draw(st.booleans())
        return {**rule, "rank": rank, "pointwise": draw(st.booleans()), "rslora": draw(st.booleans()), "dora": dora}
    if kind == "conv_lora":
        return {**rule, "rank": rank, "scales": [1, 2], "pointwise": draw(st.booleans())}
    sizes = draw(st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3))
    if kind == "moe_rep_mona":
        return {**rule, "rank": rank, "kernel_sizes": sizes, "top_k": 1, "spatial_attention": draw(st.booleans())}
    return {**rule, "rank": rank, "kernel_sizes": sizes, "branch_norm": draw(st.booleans())}
