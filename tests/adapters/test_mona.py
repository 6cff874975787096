"""``mona``: what is linear in it folds exactly, into fewer operations, and only when all of it agrees."""

from __future__ import annotations

import pytest
import torch

import convpeft
from convpeft.adapters import Mona, Site
from convpeft.convolution.geometry import output_geometry
from tests.cases import CASES, Variant, adapted, assert_relative, bits, net, same_bits

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
def test_one_convolution_computes_and_learns_what_the_branches_do(kernel_sizes, size):
    made = mona(rank=3, kernel_sizes=kernel_sizes)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    hidden = sum(branch(x) for branch in made.branches) / len(kernel_sizes) + x
    expected = made.mix(hidden) + hidden
    weight = torch.randn_like(expected)
    inputs = [x, *made.branches.parameters(), *made.mix.parameters()]
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    got = made._linear_part(x)
    assert_relative(got, expected)
    for one, other in zip(torch.autograd.grad((got * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_pass_runs_one_depthwise_convolution(monkeypatch):
    counted, convolve = [], torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, *rest: counted.append(rest[-1]) or convolve(x, *rest))
    made = mona(rank=3)
    made._linear_part(torch.randn(1, 3, 9, 9, dtype=torch.float64))
    assert counted == [3, 1]  # the groups of each call: the branches', and the mixing 1x1's


@pytest.mark.parametrize("inplace", [True, False])
@torch.no_grad()
def test_a_merge_keeps_it_as_it_is(inplace):
    model, x = adapted(CASES["3x3"], MONA), CASES["3x3"].input()
    before, expected = bits(model), model(x)
    with pytest.raises(
        convpeft.MergeError, match=r"layer: its GELU and its input norm are not linear(.|\n)*strict=False"
    ):
        convpeft.merge(model)
    merged = convpeft.merge(model, strict=False, inplace=inplace)
    assert (merged is model) == inplace
    assert same_bits(before, bits(merged))
    assert torch.equal(merged(x), expected)
    assert convpeft.check(merged, x).ok


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
