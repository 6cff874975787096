"""peft's own layers on a host: the changed weight is peft's, the geometry is the layer's, and everything travels."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from tests.adapters.peft_kinds.methods import IN_SHORT, SERVED, merged_by_peft, shaken, variant
from tests.cases import CASES, LINEARS, Variant, adapted, assert_relative, named, net, randomised
from tests.references.convolution import convolve, grid_of


@pytest.mark.parametrize(("case", "kind"), named(SERVED))
def test_fresh_is_the_identity_and_trained_is_pefts_weight_on_the_layers_geometry(case, kind):
    model, x = net(case), case.input()
    before, base = model(x), list(model.state_dict())
    report = convpeft.inject(model, {"rules": [kind.rule]})
    assert convpeft.check(model, x).ok
    assert torch.equal(model(x), before)
    assert [key for key in model.state_dict() if ".convpeft." not in key] == base
    assert report.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)

    model = shaken(case, kind)
    layer, adapter = model.layer, model.layer.convpeft.a
    weight, bias = merged_by_peft(layer, adapter)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            expected = nn.functional.linear(x, weight, bias)
        else:
            expected = convolve(x, weight, bias, layer.groups, grid_of(layer, x))
        assert_relative(layer(x), expected)
        with convpeft.disabled(model):
            assert float((expected - layer(x)).abs().max()) > 1e-3


@pytest.mark.parametrize(("case", "kind"), named(SERVED))
def test_merges_exactly_alone_and_beside_a_lora(case, kind):
    x = case.input()
    for several in ((kind,), (kind, Variant("lora", "parallel", {"rank": 2, "dora": True}))):
        model = shaken(case, *several)
        merged = convpeft.merge(model)
        with torch.no_grad():
            assert_relative(merged(x), model(x))
        assert type(merged.layer) is type(net(case).layer)


@IN_SHORT
@pytest.mark.parametrize("name", ["1x1", "linear"])
def test_saved_loaded_copied_and_pickled_is_the_same(kind, name, tmp_path):
    case = CASES[name]
    model, x = shaken(case, kind), case.input()
    with torch.no_grad():
        expected = model(x)
        convpeft.save_adapter(model, tmp_path / "a.safetensors", name="a")
        keys = convpeft.inspect_adapter(tmp_path / "a.safetensors").tensors
        assert not [key for key in keys if "base_layer" in key]
        other = copy.deepcopy(model)
        convpeft.eject(other)
        convpeft.load_adapter(other, tmp_path / "a.safetensors")
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again(x), expected)
        assert again.layer.convpeft.a.options == model.layer.convpeft.a.options
    convpeft.set_active(model, None)
    assert not torch.equal(model(x), expected)
    base = net(case)
    base.load_state_dict(convpeft.eject(model).state_dict())
    assert torch.equal(model(x), base(x))


@IN_SHORT
def test_a_base_loaded_later_and_an_unfrozen_host_are_read_as_they_are_then(kind):
    case = CASES["1x1"]
    x, kinds = case.input(), (kind,)
    model = shaken(case, *kinds)
    base = net(case)
    model.load_state_dict(base.state_dict(), strict=True)
    weight, bias = merged_by_peft(model.layer, model.layer.convpeft.a)
    with torch.no_grad():
        assert_relative(model.layer(x), nn.functional.conv2d(x, weight, bias))
    unfrozen = net(case)
    convpeft.inject(unfrozen, {"rules": [kind.rule], "unfreeze": ["layer"]}, name="a")
    with torch.no_grad():
        unfrozen.layer.weight.mul_(1.5)
    randomised_a_little(unfrozen)
    merged = convpeft.merge(unfrozen)
    with torch.no_grad():
        assert_relative(merged(x), unfrozen(x))


def randomised_a_little(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "convpeft" in name and "_stash" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


@IN_SHORT
def test_only_the_methods_own_parameters_learn(kind):
    case = CASES["1x1"]
    model, x = shaken(case, kind), case.input()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".convpeft." in name), name
        assert parameter.requires_grad == (".convpeft." in name), name


@IN_SHORT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_follows_the_host(kind, dtype):
    case = CASES["1x1"]
    model, x = shaken(case, kind, dtype=dtype), case.input(dtype)
    own = model.layer.convpeft.a
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = model.layer(x)
    got.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in own.parameters())
    with torch.no_grad():
        wide = copy.deepcopy(model).double().layer(x.double())
    assert got.dtype == dtype
    # the changed weight is worked out in float32 and rounded once, like each of the two convolutions and their sum
    assert_relative(got.detach().double(), wide, 16 * torch.finfo(dtype).eps)


@IN_SHORT
def test_dropout_is_of_the_updates_input(kind):
    case = CASES["1x1"]
    model, x = shaken(case, Variant(kind.kind, "parallel", {**kind.options, "dropout": 0.5})), case.input()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_scales_are_not_decayed_to_zero():
    for method, name in (("ia3", "ia3_l"), ("boft", "boft_s")):
        adapter = adapted(CASES["1x1"], variant(method)).layer.convpeft.a
        assert [key for key in adapter.no_decay() if name in key]


def test_randomised_buffers_still_merge():
    """VeRA's frozen projections are part of its change: whatever they hold is merged."""
    case = LINEARS[0]
    model = net(case)
    convpeft.inject(model, {"rules": [variant("vera").rule]})
    randomised(model)
    x = case.input()
    with torch.no_grad():
        assert_relative(convpeft.merge(model)(x), model(x))
