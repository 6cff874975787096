"""``mona``: what is linear in it folds exactly, into fewer operations, and only when all of it agrees."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters import Mona, Site
from convpeft.geometry import output_geometry

from .cases import CONVS, Variant, adapted, assert_relative, bits, named, net, randomised, same_bits

CASES = {case.name: case for case in CONVS}
MONA = Variant("mona", "output", {"rank": 4, "kernel_sizes": [3, 5, 7]})
LORA = Variant("lora", "output", {"rank": 2})


def mona(**options) -> Mona:
    """Return a random adapter on 6 channels, in float64."""
    return randomised_all(Mona(Site("output", output_geometry(6, False)), Mona.Options(**options)).double())


def randomised_all(module: Mona) -> Mona:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def test_it_starts_as_the_paper_says():
    fresh = Mona(Site("output", output_geometry(8, False)), Mona.Options())
    assert fresh.down.out_channels == 64
    assert [tuple(branch.weight.shape) for branch in fresh.branches] == [(64, 1, k, k) for k in (3, 5, 7)]
    assert torch.equal(fresh.input_scale, torch.ones(8))
    assert torch.equal(fresh.norm_scale, torch.full((8,), 1e-6))
    assert not fresh.up.weight.any()
    assert {"norm_scale", "input_scale", "norm.weight", "up.bias"} <= fresh.no_decay()
    assert "down.weight" not in fresh.no_decay()


@pytest.mark.parametrize("kernel_sizes", [(3, 5, 7), (1,), (5,), (7, 3), (3, 3, 9)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 8)], ids=str)
@torch.no_grad()
def test_folded_is_what_it_was(kernel_sizes, size):
    made = mona(rank=3, kernel_sizes=kernel_sizes)
    before, x = bits(made), torch.randn(2, 6, *size, dtype=torch.float64)
    folded = made.folded()
    assert same_bits(before, bits(made))
    assert not made.is_folded
    assert [tuple(branch.weight.shape) for branch in folded.branches] == [(3, 1, max(kernel_sizes), max(kernel_sizes))]
    assert_relative(folded(x), made(x))


def test_folding_counts_fewer_operations():
    made = mona(rank=8)
    taps = [sum(branch.weight.numel() for branch in each.branches) for each in (made, made.folded())]
    assert taps == [8 * (9 + 25 + 49), 8 * 49]


def test_folding_twice_is_refused():
    folded = mona(rank=2).folded()
    assert folded.foldable() is None
    with pytest.raises(convpeft.NotMergeable, match="folded already"):
        folded.folded()


def test_the_plan_says_what_folds_and_what_stays():
    reason = convpeft.plan_merge(adapted(CASES["3x3"], MONA)).refused["layer"]
    assert "its GELU and its input norm are not linear" in reason
    assert "3 branches with the inner residual fold into one depthwise 7×7" in reason
    assert "the norm, the two projections and the GELU stay" in reason
    with pytest.raises(convpeft.MergeError, match=r"layer: its GELU(.|\n)*one depthwise 7×7(.|\n)*strict=False"):
        convpeft.merge(adapted(CASES["3x3"], MONA))


@pytest.mark.parametrize("inplace", [True, False])
@torch.no_grad()
def test_a_merge_that_keeps_it_folds_it(inplace):
    model, x = adapted(CASES["3x3"], MONA), CASES["3x3"].input()
    before, expected = bits(model), model(x)
    merged = convpeft.merge(model, strict=False, inplace=inplace)
    assert (merged is model) == inplace
    if not inplace:
        assert same_bits(before, bits(model))
    one = merged.layer.convpeft.a
    assert one.is_folded
    assert "folded" in repr(one)
    assert len(one.branches) == 1
    assert_relative(merged(x), expected)
    assert convpeft.check(merged, x).ok
    assert "fold into" not in convpeft.plan_merge(merged).refused["layer"]
    again = convpeft.merge(merged, strict=False)
    assert same_bits(bits(merged), bits(again))


@torch.no_grad()
def test_it_folds_beside_a_linear_adapter_that_could_not_merge_either():
    model, x = adapted(CASES["3x3"], MONA, LORA), CASES["3x3"].input()
    merged = convpeft.merge(model, strict=False)
    assert merged.layer.convpeft.a.is_folded
    assert not merged.layer.convpeft.b.is_folded
    assert_relative(merged(x), model(x))


@torch.no_grad()
def test_a_folded_model_copies_pickles_loads_and_ejects():
    model, x = adapted(CASES["3x3"], MONA), CASES["3x3"].input()
    base = copy.deepcopy(model)
    convpeft.eject(base)
    merged = convpeft.merge(model, strict=False)
    expected = merged(x)
    assert torch.equal(copy.deepcopy(merged)(x), expected)
    file = io.BytesIO()
    torch.save(merged, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    other = convpeft.merge(adapted(CASES["3x3"], MONA), strict=False)
    other.load_state_dict(merged.state_dict())
    assert torch.equal(other(x), expected)
    convpeft.set_active(merged, None)
    assert torch.equal(merged(x), base(x))
    convpeft.eject(merged)
    assert same_bits(bits(base), bits(merged))


def test_a_folded_adapter_still_trains():
    merged = convpeft.merge(adapted(CASES["3x3"], MONA), strict=False)
    merged(CASES["3x3"].input()).square().sum().backward()
    for name, parameter in merged.named_parameters():
        assert parameter.requires_grad == ("convpeft" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_folded_adapter_has_no_file_form(tmp_path):
    merged = convpeft.merge(adapted(CASES["3x3"], MONA), strict=False)
    with pytest.raises(convpeft.StateError, match=r"'a' was folded for deployment .* on layer, .*no file form"):
        convpeft.save_adapter(merged, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def broken(self: Mona) -> Mona:
    """A fold that forgets the inner residual."""
    result = ORIGINAL(self)
    with torch.no_grad():
        result.branches[0].weight[:, :, 3, 3] -= 1
    return result


ORIGINAL = Mona.folded


def test_a_fold_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(Mona, "folded", broken)
    model, x = adapted(CASES["3x3"], MONA), CASES["3x3"].input()
    assert "it is not folded: folded it does not compute what it did" in convpeft.plan_merge(model).refused["layer"]
    merged = convpeft.merge(model, strict=False)
    assert not merged.layer.convpeft.a.is_folded
    assert torch.equal(merged(x), model(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_folded(value):
    model = adapted(CASES["3x3"], MONA)
    with torch.no_grad():
        model.layer.convpeft.a.branches[1].weight[0, 0, 0, 0] = value
    assert "it is not folded: it has non-finite weights" in convpeft.plan_merge(model).refused["layer"]
    assert not convpeft.merge(model, strict=False).layer.convpeft.a.is_folded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_fold_is_rounded_once(dtype):
    model = adapted(CASES["3x3"], MONA, dtype=dtype)
    folded = convpeft.merge(model, strict=False).layer.convpeft.a
    exact = convpeft.merge(copy.deepcopy(model).double(), strict=False).layer.convpeft.a
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    for got, expected in zip(folded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("case", named([CASES["stride2"], CASES["groups2"], CASES["own-constructor"]]))
@torch.no_grad()
def test_it_folds_on_the_output_of_any_layer(case):
    model, x = adapted(case, MONA), case.input()
    assert_relative(convpeft.merge(model, strict=False)(x), model(x))


def test_inactive_and_other_layers_are_left_alone():
    model = net(CASES["3x3"])
    rules = [{**MONA.rule}, {"match": "stem", "kind": "bottleneck", "reduction": 2}]
    convpeft.inject(model, {"rules": rules}, name="a")
    randomised(model)
    stem = bits(model.stem.convpeft.a)
    merged = convpeft.merge(model, strict=False)
    assert same_bits(stem, bits(merged.stem.convpeft.a))
    assert isinstance(merged.stem, nn.Conv2d)
    assert merged.layer.convpeft.a.is_folded


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be above 0, not 0"),
        ({"kernel_sizes": [3, 4]}, "kernel_sizes must be odd and at least 1 .*, not 4"),
        ({"kernel_sizes": []}, "kernel_sizes must name at least one size"),
        ({"dropout": 1}, r"dropout must be at least 0 and below 1, not 1\.0"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, text):
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "mona", **options}]})
