"""Random layers, adapters and merge forms: merged equals adapted, or a refusal that says why. Never a crash, never wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

import convpeft

from .cases import assert_relative, randomised

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))
SMALL_PAIRS = st.tuples(st.integers(1, 2), st.integers(1, 2))


@st.composite
def layers(draw: st.DrawFn) -> nn.Conv2d:
    """Draw any small Conv2d, or timm's Conv2dSame."""
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, dilation, bias = draw(PAIRS), draw(SMALL_PAIRS), draw(st.booleans())
    shape = {"kernel_size": kernel, "dilation": dilation, "groups": groups, "bias": bias}
    style = draw(st.sampled_from(["pixels", "pixels", "same", "tf-same"]))
    if style == "tf-same":
        return Conv2dSame(*channels, stride=draw(SMALL_PAIRS), **shape)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if style == "same":
        return nn.Conv2d(*channels, padding="same", padding_mode=mode, **shape)
    stride, padding = draw(PAIRS), draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    return nn.Conv2d(*channels, stride=stride, padding=padding, padding_mode=mode, **shape)


@st.composite
def rules(draw: st.DrawFn) -> dict:
    """Draw a rule for ``layer``."""
    kind, place = draw(st.sampled_from(["lora", "rep_mona"])), draw(st.sampled_from(["parallel", "parallel", "output"]))
    rule = {"match": "layer", "kind": kind, "place": place, "rank": draw(st.integers(1, 5))}
    if kind == "lora":
        return {**rule, "pointwise": draw(st.booleans()), "rslora": draw(st.booleans())}
    sizes = draw(st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3))
    return {**rule, "kernel_sizes": sizes, "branch_norm": draw(st.booleans())}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    layer=layers(),
    chosen=st.lists(rules(), min_size=1, max_size=2),
    form=st.sampled_from(["auto", "single", "factored"]),
    size=st.tuples(st.integers(9, 13), st.integers(9, 13)),
)
@torch.no_grad()
def test_merged_is_adapted_or_refused(layer, chosen, form, size):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": layer}).double().eval()
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64)
    try:
        bare = model["layer"](x)
    except RuntimeError:
        assume(False)
    for number, rule in enumerate(chosen):
        convpeft.inject(model, {"rules": [rule]}, name=f"a{number}")
        assert torch.equal(model["layer"](x), bare)
    convpeft.set_active(model, [f"a{number}" for number in range(len(chosen))])
    randomised(model)
    adapted = model["layer"](x)
    planned = convpeft.plan_merge(model, form=form)
    if planned.refused:
        event("refused")
        with pytest.raises(convpeft.MergeError) as refusal:
            convpeft.merge(model, form=form)
        assert refusal.value.reasons == planned.refused
        assert_known_refusal(planned.refused["layer"], layer, chosen)
        return
    merged = convpeft.merge(model, form=form)
    assert_relative(merged["layer"](x), adapted)
    assert type(merged["layer"]) is convpeft.hosting.base_class(layer)
    assert not [key for key in merged.state_dict() if "convpeft" in key]


def assert_known_refusal(reason: str, layer: nn.Conv2d, chosen: list[dict]) -> None:
    """Only clamped TF-same layers, and output chains beside parallel ones, are ever refused."""
    if "clamped" in reason:
        assert isinstance(layer, Conv2dSame)
    else:
        assert "do not fold into one kernel" in reason
        assert {rule["place"] for rule in chosen} == {"parallel", "output"}


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_inputs_smaller_than_a_grown_padding_fail_in_words(mode):
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)})
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": "rep_mona", "kernel_sizes": [7]}]})
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        model["layer"](torch.randn(1, 4, 2, 2))
