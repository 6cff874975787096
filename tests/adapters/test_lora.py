"""``lora``: its scale and its size, and beside ConvTranspose2d what the contract does not ask: sizes, files, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from tests.adapter_files import assert_refused, forged, parts
from tests.cases import (
    CASES,
    TRANSPOSED,
    VARIANTS,
    Variant,
    adapted,
    assert_relative,
    bits,
    named,
    net,
    randomised,
    same_bits,
)

LORA = [variant for variant in VARIANTS if variant.kind == "lora" and variant.place == "parallel"]
UPSAMPLE = TRANSPOSED[0]
PAIRS = [(case, variant) for case in TRANSPOSED for variant in LORA]


class Upsample(nn.ConvTranspose2d):
    """A subclass with a constructor of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 2, stride=2)


@pytest.mark.parametrize(("case", "variant"), named(PAIRS))
@torch.no_grad()
def test_every_output_size_is_adapted_and_merges(case, variant):
    fresh, model, x = net(case), adapted(case, variant), case.input()
    layer, own = model.layer, fresh.layer
    convpeft.inject(fresh, {"rules": [variant.rule]})
    smallest = [
        size - extra
        for size, extra in zip(nn.ConvTranspose2d.forward(own, x).shape[2:], own.output_padding, strict=True)
    ]
    merged = convpeft.merge(model).layer
    assert type(merged) is nn.ConvTranspose2d
    for rows in range(own.stride[0]):
        for columns in range(own.stride[1]):
            size = [smallest[0] + rows, smallest[1] + columns]
            assert torch.equal(own(x, size), nn.ConvTranspose2d.forward(own, x, size))
            got = layer(x, size)
            assert list(got.shape[2:]) == size
            assert not torch.equal(got, nn.ConvTranspose2d.forward(layer, x, size))
            assert_relative(merged(x, size), got)
            for call in ({"input": x, "output_size": size}, {"output_size": size, "input": x}):
                assert torch.equal(layer(**call), got)


@pytest.mark.parametrize(("case", "variant"), named(PAIRS))
@torch.no_grad()
def test_a_file_brings_the_very_outputs_back(case, variant, tmp_path):
    model, x = net(case), case.input()
    base, kinds = bits(model), [type(module) for module in model.modules()]
    convpeft.inject(model, {"rules": [variant.rule]})
    path = convpeft.save_adapter(randomised(model), tmp_path / "adapter.safetensors")
    expected = model(x)
    assert not torch.equal(convpeft.eject(model)(x), expected)
    assert same_bits(base, bits(model))
    assert [type(module) for module in model.modules()] == kinds
    convpeft.load_adapter(model, path)
    assert torch.equal(model(x), expected)


def test_subclasses_keep_their_class_through_a_merge():
    model = nn.ModuleDict({"layer": Upsample(4)}).double().eval()
    convpeft.inject(model, {"rules": [LORA[0].rule]})
    randomised(model)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        merged = convpeft.merge(model)["layer"]
        assert type(merged) is Upsample
        assert_relative(merged(x), model["layer"](x))


@pytest.mark.parametrize("kind", [*sorted({v.kind for v in VARIANTS if v.place == "parallel"} - {"lora"}), "peft:loha"])
def test_other_kinds_refuse_at_plan_time_and_pass_by_under_a_glob(kind):
    model = net(UPSAMPLE)
    before = bits(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(
            convpeft.SpecError,
            match=rf"kind '{kind}' cannot serve \(ConvTranspose2d\); it serves Conv2d and Linear layers",
        ):
            function(model, {"rules": [{"match": "layer", "kind": kind, "place": "parallel"}]})
    assert same_bits(before, bits(model))
    planned = convpeft.plan(model, {"rules": [{"match": "**", "kind": kind}]})
    assert [layer.name for layer in planned.layers] == ["stem"]


def test_a_glob_of_lora_takes_it():
    planned = convpeft.plan(net(UPSAMPLE), {"rules": [{"match": "**", "kind": "lora"}]})
    assert [layer.name for layer in planned.layers] == ["stem", "layer"]
    assert "4→6 2×2 s2 transposed" in str(planned)


def test_a_plain_convolution_of_the_same_channels_is_no_home_for_its_file(tmp_path):
    model = adapted(UPSAMPLE, LORA[0])
    path = convpeft.save_adapter(model, tmp_path / "adapter.safetensors")
    other = net(UPSAMPLE)
    other.layer = nn.Conv2d(4, 6, 2, stride=2).double()
    before = bits(other)
    with pytest.raises(
        convpeft.AdapterFileError, match=r"layer \(Conv2d\): 4→6 2×2 s2 here, 4→6 2×2 s2 transposed in the file"
    ):
        convpeft.load_adapter(other, path, any_base=True)
    assert same_bits(before, bits(other))


def test_a_file_that_lies_about_its_kind_is_refused(tmp_path):
    path = convpeft.save_adapter(adapted(UPSAMPLE, LORA[0]), tmp_path / "adapter.safetensors")
    _, metadata, _ = parts(path)
    assert metadata["layers"]["layer"]["geometry"]["transposed"] is True
    options = {"rank": 4, "scales": [1], "top_k": 1}
    lying = forged(
        path, tmp_path / "lie.safetensors", lambda m: m["layers"]["layer"].update(kind="conv_lora", options=options)
    )
    assert_refused(
        lying,
        "layer \(ConvTranspose2d\) cannot take kind 'conv_lora': beside a layer it serves Conv2d, Linear",
        net(UPSAMPLE),
        any_base=True,
    )


@torch.no_grad()
def update(options: dict, name: str = "3x3") -> torch.Tensor:
    """Return what a LoRA with fixed random factors adds to a layer."""
    torch.manual_seed(1)
    case = CASES[name]
    model = adapted(case, Variant("lora", "parallel", options))
    return model.layer.convpeft.a(case.input())


def test_alpha_and_rslora_scale_the_update():
    plain = update({"rank": 4})
    assert_relative(update({"rank": 4, "alpha": 4.0}), plain, 0)
    assert_relative(update({"rank": 4, "alpha": 8.0}), 2 * plain, 1e-15)
    assert_relative(update({"rank": 4, "rslora": True}), 2 * plain, 1e-15)  # 4 / sqrt(4)
    assert_relative(update({"rank": 4, "alpha": 1.0, "rslora": True}), plain / 2, 1e-15)


def test_pointwise_down_is_one_pixel():
    model = adapted(CASES["3x3"], Variant("lora", "parallel", {"rank": 4, "pointwise": True}))
    assert model.layer.convpeft.a.down.shape == (4, 4, 1, 1)


@pytest.mark.parametrize("rank", [1, 3, 4, 64])
def test_a_depthwise_layers_lora_is_no_larger_than_the_layer(rank):
    case = CASES["depthwise"]
    model = adapted(case, Variant("lora", "parallel", {"rank": rank}))
    assert model.layer.convpeft.a.down.numel() <= model.layer.weight.numel()
