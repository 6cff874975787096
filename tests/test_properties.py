"""Random layers, adapters, merge forms and dtypes: merged equals adapted, or a refusal says why. No crash, never wrong.

``make nightly`` draws 20,000 examples; conftest.py has both profiles.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

import convpeft

from .cases import DTYPES, assert_relative, randomised

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))
SMALL_PAIRS = st.tuples(st.integers(1, 2), st.integers(1, 2))


@st.composite
def layers(draw: st.DrawFn) -> nn.Conv2d | nn.ConvTranspose2d:
    """Draw any small Conv2d or ConvTranspose2d, or timm's Conv2dSame."""
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, dilation, bias = draw(PAIRS), draw(SMALL_PAIRS), draw(st.booleans())
    shape = {"kernel_size": kernel, "dilation": dilation, "groups": groups, "bias": bias}
    style = draw(st.sampled_from(["pixels", "pixels", "same", "tf-same", "transposed"]))
    if style == "tf-same":
        return Conv2dSame(*channels, stride=draw(SMALL_PAIRS), **shape)
    if style == "transposed":
        stride, padding = draw(PAIRS), draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        extra = tuple(draw(st.integers(0, max(steps) - 1)) for steps in zip(stride, dilation, strict=True))
        return nn.ConvTranspose2d(*channels, stride=stride, padding=padding, output_padding=extra, **shape)
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
        dora = place == "parallel" and draw(st.booleans())
        return {**rule, "pointwise": draw(st.booleans()), "rslora": draw(st.booleans()), "dora": dora}
    sizes = draw(st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3))
    return {**rule, "kernel_sizes": sizes, "branch_norm": draw(st.booleans())}


@given(
    layer=layers(),
    chosen=st.lists(rules(), min_size=1, max_size=2),
    form=st.sampled_from(["auto", "single", "factored"]),
    size=st.tuples(st.integers(9, 13), st.integers(9, 13)),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
)
@torch.no_grad()
def test_merged_is_adapted_or_refused(layer, chosen, form, size, dtype):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": layer}).to(dtype).eval()
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64).to(dtype)
    try:
        bare = model["layer"](x)
    except RuntimeError:
        assume(False)
    for rule in [rule for rule in chosen if not serves(rule, layer)]:
        event("not served")
        with pytest.raises(convpeft.SpecError, match=r"'rep_mona' cannot serve \(ConvTranspose2d\)"):
            convpeft.inject(model, {"rules": [rule]})
    chosen = [rule for rule in chosen if serves(rule, layer)]
    if not chosen:
        return
    for number, rule in enumerate(chosen):
        convpeft.inject(model, {"rules": [rule]}, name=f"a{number}")
        assert torch.equal(model["layer"](x), bare)
    convpeft.set_active(model, [f"a{number}" for number in range(len(chosen))])
    randomised(model)
    adapted = copy.deepcopy(model).double()["layer"](x.double())
    planned = convpeft.plan_merge(model, form=form)
    if planned.refused:
        event("refused")
        with pytest.raises(convpeft.MergeError) as refusal:
            convpeft.merge(model, form=form)
        assert refusal.value.reasons == planned.refused
        assert_known_refusal(planned.refused["layer"], layer, chosen)
        return
    merged = convpeft.merge(model, form=form)
    assert_within_budget(merged["layer"], x, adapted)
    assert type(merged["layer"]) is convpeft.hosting.base_class(layer)
    assert not [key for key in merged.state_dict() if "convpeft" in key]


def serves(rule: dict, layer: nn.Module) -> bool:
    """Whether the rule's kind has kernels for the layer."""
    return rule["kind"] == "lora" or rule["place"] == "output" or not isinstance(layer, nn.ConvTranspose2d)


def assert_within_budget(layer: nn.Module, x: torch.Tensor, exact: torch.Tensor) -> None:
    """Compare a merged layer with the exact output of the adapted one, whose weights are rounded to ``x.dtype`` already.

    In lower precision each step rounds its weight and its output, half an eps each, whatever the order of its sums (which
    are in float32); a chain has four steps at most, and then come the sums of two chains and the layer. So six eps
    of the majorant: the same layers with absolute weights and biases, run on the absolute input. Sums of float32 add an
    eps for each of some hundred terms at the very worst; the budget of 1e-5 holds them.
    """
    if x.dtype == torch.float64:
        assert_relative(layer(x), exact)
        return
    majorant = copy.deepcopy(layer).double()
    for parameter in majorant.parameters():
        parameter.data.abs_()
    budget = 1e-5 if x.dtype == torch.float32 else 6 * torch.finfo(x.dtype).eps
    excess = (layer(x).double() - exact).abs() - budget * majorant(x.double().abs())
    assert float(excess.max()) <= torch.finfo(x.dtype).tiny, f"{float(excess.max()):.3g} over the budget"


def assert_known_refusal(reason: str, layer: nn.Conv2d, chosen: list[dict]) -> None:
    """Only clamped TF-same layers, and output chains beside parallel ones, are ever refused."""
    if "clamped" in reason:
        assert isinstance(layer, Conv2dSame)
    elif "depends on the layer" in reason:
        assert {rule["place"] for rule in chosen} == {"parallel", "output"}
    else:
        assert "do not fold into one kernel" in reason
        assert {rule["place"] for rule in chosen} == {"parallel", "output"}


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_merged_layers_refuse_inputs_smaller_than_their_grown_padding_in_words(mode):
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)})
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": "rep_mona", "kernel_sizes": [7]}]})
    randomised(model)
    small = torch.randn(1, 4, 2, 2)
    assert model["layer"](small).shape == (1, 6, 2, 2)
    for form in ("single", "factored"):
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):
            convpeft.merge(model, form=form)["layer"](small)
