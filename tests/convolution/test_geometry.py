"""ConvGeometry against direct loops, and its algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convpeft import ConvGeometry, GeometryError
from tests.cases import CONVS, LAYERS, LINEARS, TRANSPOSED, assert_relative, conv, named
from tests.references import convolution as reference

SIZES = [(1, 1), (3, 3), (5, 7), (1, 3)]  # a centre needs odd sizes; the hosts are of any


@pytest.mark.parametrize("case", named(LAYERS))
def test_reference_and_geometry_agree_with_the_layer(case):
    layer, x = case.build().double(), case.input()
    with torch.no_grad():
        own = layer(x)
        geometry = ConvGeometry.of(layer)
        weight = geometry.as_kernel(layer.weight)
        assert torch.equal(geometry.as_weight(weight), layer.weight)
        assert_relative(reference.run(layer, x), own, 1e-14)
        assert_relative(geometry.convolve(x, weight, layer.bias), own, 1e-14)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", named(CONVS))
def test_resized_kernels_stay_centred_on_the_same_pixels(case, size):
    layer, x = case.build().double(), case.input()
    resized = ConvGeometry.of(layer).resized(size)
    weight = torch.randn(resized.weight_shape(), dtype=torch.float64)
    expected = reference.convolve(x, weight, None, layer.groups, reference.grid_of(layer, x).of_size(size))
    assert_relative(resized.convolve(x, weight), expected, 1e-14)


@pytest.mark.parametrize("case", named(TRANSPOSED))
def test_a_centre_tap_lands_on_the_pixels_of_the_whole_kernels_centre(case):
    layer, x = case.build().double(), case.input()
    geometry = ConvGeometry.of(layer).resized((1, 1))
    weight, bias = torch.randn(geometry.weight_shape(), dtype=torch.float64), torch.randn(layer.out_channels).double()
    expected = reference.spread(x, reference.turned(weight, layer.groups), bias, layer)
    assert_relative(geometry.convolve(x, weight, bias), expected, 1e-14)


@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("case", named([case for case in TRANSPOSED if max(case.build().stride) > 1]))
def test_an_output_size_may_be_asked_for(case, pointwise):
    layer, x = case.build().double(), case.input()
    geometry = ConvGeometry.of(layer)
    weight = geometry.as_kernel(layer.weight.detach())
    if pointwise:  # the same function, its other taps being zero
        geometry, weight = geometry.resized((1, 1)), torch.zeros_like(weight)
        centre = tuple(taps // 2 for taps in layer.kernel_size)
        weight[..., centre[0], centre[1]] = torch.randn(weight.shape[:2], dtype=torch.float64)
        layer.weight.data = ConvGeometry.of(layer).as_weight(weight)
        weight = weight[..., centre[0], centre[1], None, None]
    least = [size - extra for size, extra in zip(layer(x).shape[2:], layer.output_padding, strict=True)]
    largest = [stride - 1 for stride in layer.stride]
    for extra in ((0, 0), tuple(largest)):
        size = [small + more for small, more in zip(least, extra, strict=True)]
        with torch.no_grad():
            assert_relative(geometry.convolve(x, weight, layer.bias, size), layer(x, size), 1e-14)


@pytest.mark.parametrize("case", named(CONVS))
def test_sample_is_a_centred_one_hot_kernel(case):
    layer, x = case.build().double(), case.input()
    centre = ConvGeometry.of(layer).with_channels(4, 4, groups=4).resized((1, 1))
    assert torch.equal(centre.sample(x), centre.convolve(x, torch.ones(4, 1, 1, 1, dtype=torch.float64)))


@pytest.mark.parametrize("case", named(CONVS))
def test_covering_grows_evenly_and_holds_every_size(case):
    geometry = ConvGeometry.of(case.build())
    grown = geometry.covering((1, 1), (7, 3))
    for axis, (old, new) in enumerate(zip(geometry.kernel_size, grown.kernel_size, strict=True)):
        before = grown.padding[2 * axis] - geometry.padding[2 * axis]
        after = grown.padding[2 * axis + 1] - geometry.padding[2 * axis + 1]
        assert before == after == geometry.dilation[axis] * (new - old) // 2
        first = old // 2 - (7, 3)[axis] // 2  # of the larger kernel's taps, counted in the host's
        assert first >= -((new - old) // 2)
        assert first + (7, 3)[axis] <= old + (new - old) // 2
    assert geometry.covering((1, 1)) == geometry


@pytest.mark.parametrize("case", named([case for case in CONVS + TRANSPOSED if not case.name.startswith("tf")]))
def test_build_makes_a_plain_layer_of_the_same_function(case):
    layer, x = case.build().double(), case.input()
    geometry = ConvGeometry.of(layer)
    built = geometry.build(geometry.as_kernel(layer.weight), layer.bias)
    assert type(built) is (nn.ConvTranspose2d if geometry.transposed else nn.Conv2d)
    assert ConvGeometry.of(built) == geometry
    assert torch.equal(built(x), layer(x))


@pytest.mark.parametrize("case", named(LINEARS))
def test_build_linear(case):
    layer, x = case.build().double(), case.input()
    geometry = ConvGeometry.of(layer)
    built = geometry.build(layer.weight.reshape(geometry.weight_shape()), layer.bias)
    assert type(built) is nn.Linear
    assert torch.equal(built(x), layer(x))


@pytest.mark.parametrize("case", named(LAYERS))
def test_geometry_survives_plain_data(case):
    geometry = ConvGeometry.of(case.build())
    assert ConvGeometry.from_dict(geometry.to_dict()) == geometry


def test_a_geometry_from_an_earlier_file_has_the_later_fields_defaults():
    fields = ConvGeometry.of(nn.Conv2d(4, 6, 3, padding=1)).to_dict()
    assert not {"transposed", "output_padding"} & set(fields)
    assert ConvGeometry.from_dict(fields) == ConvGeometry.of(nn.Conv2d(4, 6, 3, padding=1))


def test_unbatched_images_are_served():
    layer, x = conv("3x3", 3, padding=1, padding_mode="reflect").build().double(), torch.randn(4, 9, 8).double()
    assert torch.equal(ConvGeometry.of(layer).convolve(x, layer.weight, layer.bias), layer(x))


def test_other_modules_have_no_geometry():
    with pytest.raises(GeometryError, match="BatchNorm2d is no Conv2d, ConvTranspose2d or Linear"):
        ConvGeometry.of(nn.BatchNorm2d(3))


def test_imprint_refuses_what_conv2d_cannot_express():
    uneven = ConvGeometry(4, 6, (2, 2), padding=(0, 1, 0, 1))
    with pytest.raises(GeometryError, match=r"padding \(0, 1, 0, 1\) .* is not one Conv2d can express"):
        uneven.imprint(nn.Conv2d(4, 6, 2))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "clamped"), [(1, 2, 1, True), (3, 2, 1, False), (2, 3, 1, True), (2, 3, 2, False)]
)
def test_clamped_tf_padding_is_told(kernel, stride, dilation, clamped):
    geometry = ConvGeometry(4, 6, (kernel,) * 2, (stride,) * 2, dilation=(dilation,) * 2, dynamic_kernel=(kernel,) * 2)
    refusal = geometry.shift_when_grown()
    assert (refusal is not None) == clamped
    assert refusal is None or "clamped" in refusal


@pytest.mark.parametrize(
    ("padding", "expected"), [("valid", (0, 0, 0, 0)), ("same", (0, 1, 2, 2)), ((3, 1), (3, 3, 1, 1))]
)
def test_padding_is_read_side_by_side(padding, expected):
    assert ConvGeometry.of(nn.Conv2d(1, 1, (2, 3), dilation=(1, 2), padding=padding)).padding == expected


def test_geometry_reads_as_text():
    assert str(ConvGeometry.of(nn.Conv2d(4, 8, (1, 5), stride=(2, 1), groups=2))) == "4→8 1×5 s(2, 1) g2"
    assert str(ConvGeometry.of(nn.Linear(4, 8))) == "4→8"
    assert str(ConvGeometry.of(nn.ConvTranspose2d(4, 8, 2, stride=2))) == "4→8 2×2 s2 transposed"


def test_a_transposed_convolution_costs_its_mean():
    assert ConvGeometry.of(nn.ConvTranspose2d(4, 8, 3, stride=2)).macs == 4 * 8 * 9 // 4
