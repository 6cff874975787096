"""Conv-LoRA: experts at several scales, gates for each image, and a loss that balances them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import CASES, Variant, adapted, assert_relative, bits, net, same_bits
from tests.references.low_rank import conv_lora, resize
from tests.references.visual import route

KIND = Variant("conv_lora", "parallel", {"rank": 4, "scales": [1, 2, 3], "top_k": 1, "load_balancing": 0.5})


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", ["3x3", "stride2", "groups2-reflect-stride2", "depthwise"])
@torch.no_grad()
def test_forward_is_the_formula_for_any_number_of_experts(name, top_k):
    case = CASES[name]
    model, x = adapted(case, Variant("conv_lora", "parallel", {**KIND.options, "top_k": top_k})), case.input()
    adapter = model.layer.convpeft.a
    assert_relative(adapter(x), conv_lora(model.layer, adapter, x))


@torch.no_grad()
def test_an_image_without_its_batch_axis_is_the_same():
    case = CASES["3x3"]
    adapter, x = adapted(case, KIND).layer.convpeft.a, case.input()
    assert_relative(adapter(x[0]), adapter(x[:1])[0])


@torch.no_grad()
def test_each_image_has_its_own_experts():
    """Nothing of one image reaches another: not through the gates, not through the experts."""
    case = CASES["3x3"]
    adapter, x = adapted(case, KIND).layer.convpeft.a, case.input()
    moved = x.clone()
    moved[0] = torch.randn_like(moved[0])
    assert_relative(adapter(moved)[1], adapter(x)[1])
    assert not torch.allclose(adapter(moved)[0], adapter(x)[0])


def test_the_loss_is_shares_times_probabilities_and_is_read_by_auxiliary_loss():
    case = CASES["groups2"]
    model, x = adapted(case, KIND), case.input()
    assert convpeft.auxiliary_loss(model) == 0
    model.train()
    model(x)
    adapter = model.layer.convpeft.a
    hidden = adapter.down_geometry.convolve(model.stem(x), adapter.down).detach()
    gates, probabilities = route(hidden, adapter.router, 2, 1)
    used, mean = (gates > 0).double().mean((0, 1)), probabilities.mean((0, 1))
    loss = convpeft.auxiliary_loss(model)
    assert_relative(loss.detach(), 0.5 * 3 * (used * mean).sum().detach())
    loss.backward()
    assert adapter.router.score.weight.grad.abs().max() > 0


def test_no_loss_outside_training_and_none_is_copied():
    case = CASES["3x3"]
    model, x = adapted(case, KIND), case.input()
    model.train()
    model(x)
    assert convpeft.auxiliary_loss(model) > 0
    assert convpeft.auxiliary_loss(copy.deepcopy(model)) == 0
    torch.save(model, io.BytesIO())
    with torch.no_grad():
        model(x)
    assert convpeft.auxiliary_loss(model) == 0
    model(x)
    model.eval()
    assert convpeft.auxiliary_loss(model) == 0
    model(x)
    assert convpeft.auxiliary_loss(model) == 0


def test_the_router_learns_from_the_task_even_with_one_expert():
    case = CASES["3x3"]
    model, x = adapted(case, KIND), case.input()
    model(x).square().sum().backward()
    adapter = model.layer.convpeft.a
    assert adapter.router.score.weight.grad.abs().max() > 0
    assert all(
        parameter.grad is not None for parameter in adapter.parameters()
    )  # all in the graph: DDP needs no search


def test_does_not_merge_and_says_why():
    model = adapted(CASES["3x3"], KIND)
    before = bits(model)
    with pytest.raises(
        convpeft.MergeError, match="its gates choose experts for each image, so no convolution equals it"
    ):
        convpeft.merge(model, inplace=True)
    assert same_bits(before, bits(model))
    assert "no convolution equals it" in str(convpeft.plan(net(CASES["3x3"]), {"rules": [KIND.rule]}))


@pytest.mark.parametrize("name", ["3x3", "groups2"])
def test_compiles_in_one_graph(name):
    case = CASES[name]
    model, x = adapted(case, KIND), case.input()
    torch._dynamo.reset()
    assert_relative(torch.compile(model, fullgraph=True, backend="eager")(x).detach(), model(x).detach())


@torch.no_grad()
def test_saved_loaded_copied_and_pickled_is_the_same(tmp_path):
    case = CASES["groups2"]
    model, x = adapted(case, KIND), case.input()
    expected = model(x)
    convpeft.save_adapter(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(model)
    assert torch.equal(other(x), expected)
    convpeft.eject(other)
    convpeft.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


BAD_OPTIONS = [
    ({"scales": []}, "scales must name at least one scale"),
    ({"scales": [0, 1]}, "scales must be whole numbers of at least 1 and at most 64, not 0"),
    ({"scales": [1.5]}, "scales of kind 'conv_lora' must be a list of a whole number"),
    ({"top_k": 4}, "top_k 4 is more than the 3 experts of scales"),
    ({"top_k": 0}, "top_k must be above 0, not 0"),
    ({"rank": 0}, "rank must be above 0, not 0"),
    ({"load_balancing": -1}, r"load_balancing must be 0 \(off\) or above"),
    ({"dropout": 1}, "dropout must be at least 0 and below 1"),
]


@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_bad_options_are_named(options, text):
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "conv_lora", **options}]})


@pytest.mark.parametrize("size", [(18, 16), (4, 3)])
@torch.no_grad()
def test_the_reference_resizes_as_torch_does(size):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert_relative(nn.functional.interpolate(x, size=size, mode="bilinear"), resize(x, *size))
