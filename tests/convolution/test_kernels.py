"""The kernel algebra: composed and added kernels against running the parts, in float64."""

from __future__ import annotations

import pytest
import torch

from convpeft import ConvGeometry, GeometryError, ShapeMismatch
from convpeft.convolution.kernels import (
    ConvKernel,
    add_kernels,
    compose,
    compose_depthwise,
    compose_pointwise,
    embed_on_grid,
)
from tests.cases import CONVS, assert_relative, conv, named

EXACT = 1e-13  # a few hundred float64 roundings


def kernel(geometry: ConvGeometry, bias: bool = False) -> ConvKernel:
    weight = torch.randn(geometry.weight_shape(), dtype=torch.float64)
    return ConvKernel(weight, torch.randn(geometry.out_channels).double() if bias else None, geometry)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("case", named(CONVS))
def test_spatial_then_pointwise_is_one_kernel(case, bias):
    host, x = ConvGeometry.of(case.build()), case.input()
    first = kernel(host, bias)
    second = kernel(host.pointwise(host.out_channels, 3 * host.groups, host.groups), bias)
    assert_relative(compose([first, second])(x), second(first(x)), EXACT)


@pytest.mark.parametrize("case", named(CONVS))
def test_pointwise_depthwise_pointwise_is_one_kernel(case):
    host, x = ConvGeometry.of(case.build()), case.input()
    rank, groups = 2 * host.groups, host.groups
    down = kernel(host.pointwise(4, rank, groups))
    spatial = kernel(host.with_channels(rank, 2 * rank, groups=rank), bias=True)
    up = kernel(host.pointwise(2 * rank, 3 * groups, groups), bias=True)
    single = compose([down, spatial, up])
    assert single.geometry == host.with_channels(4, 3 * groups)
    assert_relative(single(x), up(spatial(down(x))), EXACT)


@pytest.mark.parametrize("case", named([case for case in CONVS if case.name != "tf-same-1x1-stride2"]))
def test_added_kernels_are_the_sum_on_the_hosts_grid(case):
    layer, x = case.build().double(), case.input()
    host = ConvKernel(
        layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), ConvGeometry.of(layer)
    )
    extra = [kernel(host.geometry.resized(size), bias=True) for size in ((1, 1), (3, 3), (7, 5))]
    whole = add_kernels(host, extra)
    assert_relative(whole(x), host(x) + sum(part(x) for part in extra), EXACT)


def test_clamped_tf_same_does_not_grow():
    layer = next(case for case in CONVS if case.name == "tf-same-1x1-stride2").build().double()
    host = ConvKernel(layer.weight.detach(), None, ConvGeometry.of(layer))
    with pytest.raises(GeometryError, match=r"kernel span \(1, 1\) below stride \(2, 2\)"):
        add_kernels(host, [kernel(host.geometry.resized((3, 3)))])


def test_a_bias_before_padding_does_not_compose():
    host = ConvGeometry(4, 4, (3, 3), padding=(1, 1, 1, 1), groups=4)
    with pytest.raises(GeometryError, match="no exact composition of 4→4 1×1 followed by 4→4 3×3 g4"):
        compose([kernel(host.pointwise(4, 4), bias=True), kernel(host)])


def test_two_spatial_kernels_do_not_compose():
    host = ConvGeometry.of(conv("3x3", 4, 4, 3).build())
    with pytest.raises(GeometryError, match="no exact composition"):
        compose([kernel(host), kernel(host)])


def test_pointwise_of_other_groups_does_not_compose():
    grouped = ConvGeometry(4, 4, (3, 3), groups=2)
    with pytest.raises(GeometryError, match="no exact composition"):
        compose([kernel(grouped), kernel(grouped.pointwise(4, 4, groups=1))])


def test_shapes_are_checked():
    with pytest.raises(ShapeMismatch, match=r"weight \(6, 4, 1, 1\) for a geometry of \(6, 4, 3, 3\)"):
        ConvKernel(torch.zeros(6, 4, 1, 1), None, ConvGeometry(4, 6, (3, 3)))
    with pytest.raises(ShapeMismatch, match="outer reads 3 channels, inner makes 2"):
        compose_pointwise(torch.zeros(6, 3, 1, 1), torch.zeros(2, 4, 3, 3))
    with pytest.raises(ShapeMismatch, match="does not sit on 3 channels"):
        compose_depthwise(torch.zeros(4, 1, 3, 3), torch.zeros(3, 4, 1, 1))
    with pytest.raises(ShapeMismatch, match=r"a \(5, 5\) kernel on a \(3, 3\) host does not fit into \(3, 3\)"):
        embed_on_grid(torch.zeros(1, 1, 5, 5), (3, 3), (3, 3))
    with pytest.raises(ShapeMismatch, match="does not fit"):  # a host grows by the same taps on each side
        embed_on_grid(torch.zeros(1, 1, 3, 3), (3, 3), (4, 4))


def test_kernels_run_in_the_inputs_dtype():
    half = kernel(ConvGeometry(4, 6, (1, 1)), bias=True)(torch.randn(1, 4, 2, 2, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
