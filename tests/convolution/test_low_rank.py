"""The product of two factors as a kernel: apart, summed or as one weight, whichever costs less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convpeft.convolution import nodes
from tests.lean import FORMS, factors_for
from tests.saved import kept


@pytest.mark.parametrize(("pixels", "expected"), [(15, "separate"), (16, "summed")])
def test_kernels_are_summed_from_two_pixels_for_each_output_channel_on(pixels, expected):
    layer = nn.Conv2d(4, 8, 1).double().requires_grad_(False)
    factors, x = factors_for(layer, "summed"), torch.randn(1, 4, 1, pixels, dtype=torch.float64)
    assert [factors.form_for(x, layer.weight, training) for training in (True, False)] == [expected] * 2
    assert factors.form_for(x.bfloat16(), layer.weight, True) == "separate"
    apart = torch.equal(
        nodes.convolve(layer, x, factors, True), nodes.convolve(layer, x, factors._replace(form="separate"), True)
    )
    assert apart == (expected == "separate")


@pytest.mark.parametrize("form", FORMS)
def test_only_apart_a_map_between_the_factors_is_kept(form):
    layer = nn.Conv2d(4, 8, 3).double().requires_grad_(False)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    found = kept(lambda x: nodes.convolve(layer, x, factors_for(layer, form), True), x, layer.parameters())
    assert any(tensor.shape == (1, 2, 7, 7) for tensor in found) == (form == "separate")
