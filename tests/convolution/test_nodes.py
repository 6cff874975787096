"""Frozen convolutions and norms as nodes of their own: the gradients of the plain layers, and nothing kept in vain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpeft.convolution import nodes
from convpeft.convolution.low_rank import Factors
from tests.cases import assert_relative
from tests.lean import FORMS, factors_for, net

LAYERS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride2-dilated": {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": (2, 1)},
    "same": {"kernel_size": (3, 1), "padding": "same"},
    "groups2": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 5, "padding": 2, "groups": 4},
}


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_convolution_with_factors_has_the_gradients_of_the_plain_one(settings, form):
    layer = nn.Conv2d(4, 8, **settings).double().requires_grad_(False)
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    factors = factors_for(layer, form)
    assert factors.form_for(x, layer.weight, True) == form

    def run(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return nodes.convolve(layer, x, Factors(down, up, form), True)

    hidden = F.conv2d(x, factors.down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert_relative(run(x, *factors[:2]), layer(x) + F.conv2d(hidden, factors.up, groups=layer.groups))
    assert type(run(x, *factors[:2]).grad_fn).__name__ == "_ConvolutionBackward"
    assert torch.autograd.gradcheck(run, (x, *factors[:2]))
    if settings in (LAYERS["1x1"], LAYERS["groups2"]):  # all layers: test_second_gradients.py
        assert torch.autograd.gradgradcheck(run, (x, *factors[:2]))
    assert torch.autograd.gradcheck(run, (x.detach(), *factors[:2]))


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_a_frozen_convolution_has_the_gradient_of_its_input(settings):
    layer = nn.Conv2d(4, 8, **settings).double().requires_grad_(False)
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    run = lambda x: nodes.convolve(layer, x, None, True)  # noqa: E731
    assert torch.equal(run(x), layer(x))
    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_norm_has_the_gradient_of_its_input(affine):
    norm = net().norm if affine else nn.BatchNorm2d(8, affine=False).double()
    norm.requires_grad_(False).eval()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(nodes.normalise(norm, x), norm(x))
    assert torch.autograd.gradcheck(lambda x: nodes.normalise(norm, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: nodes.normalise(norm, x), (x,))


def test_a_channels_last_input_stays_so_both_ways():
    layer = nn.Conv2d(4, 8, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    output = nodes.convolve(layer, x, None, True)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], expected)
