"""DoRA: magnitude apart from direction, read from a host that is lent to it for each call."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters import Host
from convpeft.adapters.dora import magnitude_ratio
from tests.cases import CASES, DORA, Variant, adapted, assert_relative, bits, net, randomised, same_bits
from tests.references.low_rank import dora_weight

PLAIN = Variant("lora", "parallel", {"rank": 2})
VARIANTS = [Variant("lora", "parallel", options) for options in DORA]
KINDS = pytest.mark.parametrize("kind", VARIANTS, ids=lambda kind: kind.name)
SHAPES = pytest.mark.parametrize("name", ["3x3", "groups2", "linear"])


@SHAPES
@KINDS
@torch.no_grad()
def test_the_merged_weight_is_the_papers_and_the_bias_is_untouched(name, kind):
    model = adapted(CASES[name], kind)
    merged = convpeft.merge(model)
    assert_relative(merged.layer.weight, dora_weight(model.layer, model.layer.convpeft.a))
    assert torch.equal(merged.layer.bias, model.layer.bias)
    norms = merged.layer.weight.flatten(1).norm(dim=1)
    wanted = model.layer.weight.flatten(1).norm(dim=1) + model.layer.convpeft.a.magnitude
    assert_relative(norms, wanted.abs())  # the random magnitude may be below zero, which turns the direction round


@SHAPES
@torch.no_grad()
def test_several_active_adapters_add_up_and_merge_as_the_sum(name):
    case = CASES[name]
    model, x = adapted(case, *VARIANTS, PLAIN), case.input()
    with convpeft.disabled(model):
        bare = model.layer(x)
    total = bare.clone()
    for each in "abc":
        with convpeft.using(model, each):
            total += model.layer(x) - bare
    assert_relative(model.layer(x), total)
    assert_relative(convpeft.merge(model).layer(x), total)


@KINDS
@torch.no_grad()
def test_a_base_loaded_later_brings_its_own_norm(kind):
    case = CASES["3x3"]
    model, other, x = net(case), net(case), case.input()
    convpeft.inject(model, {"rules": [kind.rule]}, name="a")
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))  # still fresh: still the identity, of the new base
    randomised(model)
    changed = dora_weight(model.layer, model.layer.convpeft.a)
    assert_relative(model.layer(x), nn.functional.conv2d(x, changed, other.layer.bias, padding=1))


@KINDS
def test_an_unfrozen_host_is_read_as_shown(kind):
    case = CASES["3x3"]
    model, x = net(case), case.input()
    before = bits(model)
    convpeft.inject(model, {"rules": [kind.rule], "unfreeze": ["layer"]}, name="a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        expected = model(x)
        assert_relative(convpeft.merge(model)(x), expected)
    model(x).sum().backward()
    assert model.layer.weight.grad is not None
    convpeft.eject(model)
    assert same_bits(before, bits(model))


@KINDS
@torch.no_grad()
def test_saved_loaded_copied_and_pickled_is_the_same(kind, tmp_path):
    case = CASES["3x3"]
    model, x = adapted(case, kind), case.input()
    expected = model(x)
    convpeft.save_adapter(model, tmp_path / "a.safetensors")
    tensors = convpeft.inspect_adapter(tmp_path / "a.safetensors").tensors
    assert sorted(key.rsplit(":")[-1] for key in tensors) == ["down", "magnitude", "up"]
    other = copy.deepcopy(model)
    other.layer.convpeft.a.magnitude.zero_()
    assert torch.equal(model(x), expected)
    convpeft.eject(other)
    convpeft.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@SHAPES
@KINDS
def test_compiles_in_one_graph(name, kind):
    case = CASES[name]
    model, x = adapted(case, kind), case.input()
    torch._dynamo.reset()
    assert_relative(torch.compile(model, fullgraph=True, backend="eager")(x).detach(), model(x).detach())


def gradient_of_down(detach: bool, scale: float = 1.0) -> torch.Tensor:
    torch.manual_seed(0)
    model = adapted(CASES["3x3"], Variant("lora", "parallel", {"rank": 2, "dora": True, "detach_norm": detach}))
    x = CASES["3x3"].input()
    model.layer(x).square().sum().mul(scale).backward()
    return model.layer.convpeft.a.down.grad


def test_the_norm_is_a_constant_in_the_backward_pass_unless_asked_otherwise():
    """Against autograd of the paper's formula written out, with and without its norm in the graph."""
    for detach in (True, False):
        torch.manual_seed(0)
        model = adapted(CASES["3x3"], Variant("lora", "parallel", {"rank": 2, "dora": True, "detach_norm": detach}))
        x, layer, adapter = CASES["3x3"].input(), model.layer, model.layer.convpeft.a
        model.layer(x).square().sum().backward()
        down, up, magnitude = (
            p.detach().clone().requires_grad_() for p in (adapter.down, adapter.up, adapter.magnitude)
        )
        direction = layer.weight + torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
        norm = direction.square().sum((1, 2, 3)).sqrt()
        norm = norm.detach() if detach else norm
        ratio = (layer.weight.square().sum((1, 2, 3)).sqrt() + magnitude) / norm
        y = nn.functional.conv2d(x, ratio.view(-1, 1, 1, 1) * direction, layer.bias, padding=1)
        expected = torch.autograd.grad(y.square().sum(), (down, up, magnitude))
        for got, wanted in zip((adapter.down.grad, adapter.up.grad, adapter.magnitude.grad), expected, strict=True):
            assert_relative(got, wanted)
    assert not torch.allclose(gradient_of_down(True), gradient_of_down(False))


def test_an_unfrozen_weights_gradient_takes_the_magnitude_for_a_parameter():
    model, x = net(CASES["3x3"]), CASES["3x3"].input()
    convpeft.inject(model, {"rules": [VARIANTS[0].rule], "unfreeze": ["layer"]}, name="a")
    randomised(model)
    layer, adapter = model.layer, model.layer.convpeft.a
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    direction = weight + 0.75 * torch.einsum("or,rihw->oihw", adapter.up.detach()[..., 0, 0], adapter.down.detach())
    norm, start = (tensor.detach().square().sum((1, 2, 3)).sqrt() for tensor in (direction, weight))
    ratio = (start + adapter.magnitude.detach()) / norm
    y = nn.functional.conv2d(x, ratio.view(-1, 1, 1, 1) * direction, layer.bias.detach(), padding=1)
    assert_relative(layer.weight.grad, torch.autograd.grad(y.square().sum(), weight)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_dead_channel_stays_finite_and_comes_to_life(dtype):
    model, x = net(CASES["3x3"], dtype), CASES["3x3"].input(dtype)
    with torch.no_grad():
        model.layer.weight[2] = 0
        before = model.layer(x)
    convpeft.inject(model, {"rules": [VARIANTS[0].rule]}, name="a")
    assert torch.equal(model.layer(x).detach(), before)
    adapter = model.layer.convpeft.a
    model.layer(x)[:, 2].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapter.parameters())
    assert adapter.up.grad[2].abs().max() > 0


def test_the_ratio_of_large_half_precision_weights_does_not_overflow():
    weight = torch.full((2, 64, 3, 3), 60.0, dtype=torch.float16)  # the sum of squares is far beyond 65504
    ratio = magnitude_ratio(weight, torch.zeros_like(weight), torch.zeros(2, dtype=torch.float16))
    assert ratio.dtype == torch.float32
    assert torch.equal(ratio, torch.ones(2))


def test_channels_last_hosts_are_the_identity_too():
    model = net(CASES["3x3"], torch.float32).to(memory_format=torch.channels_last)
    x = CASES["3x3"].input(torch.float32)
    before = model(x)
    convpeft.inject(model, {"rules": [VARIANTS[0].rule]})
    assert torch.equal(model(x), before)


def test_autocast_keeps_the_layers_dtype():
    model, x = net(CASES["3x3"], torch.float32), CASES["3x3"].input(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model.layer(x)
        convpeft.inject(model, {"rules": [VARIANTS[0].rule]})
        assert model.layer(x).dtype == before.dtype == torch.bfloat16
        assert torch.equal(model.layer(x), before)


def test_refusals_are_sentences():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(convpeft.SpecError, match=r"dora takes a layer's weight apart, and a module's output has none"):
        convpeft.plan(model, {"rules": [{"match": "0", "kind": "lora", "dora": True, "place": "output"}]})
    with pytest.raises(convpeft.OptionError, match="detach_norm: false says something of dora only"):
        convpeft.plan(model, {"rules": [{"match": "0", "kind": "lora", "detach_norm": False}]})
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "dora": True}]}, name="a")
    with pytest.raises(TypeError, match=r"call it as adapter\(x, host\)"):
        model[0].convpeft.a(torch.zeros(1, 3, 5, 5))
    with pytest.raises(convpeft.MergeError, match="depends on the layer's weight"):
        model[0].convpeft.a.chain()


@torch.no_grad()
def test_a_host_parametrised_after_injection_is_not_merged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "dora": True}]}, name="a")
    model[0].weight[0, 0, 0, 0] = float("nan")
    assert convpeft.plan_merge(model).refused["0"] == "its own weight or bias is not finite"


@torch.no_grad()
def test_weight_decay_spares_the_magnitude():
    adapter = adapted(CASES["3x3"], VARIANTS[0]).layer.convpeft.a
    assert adapter.no_decay() == {"magnitude"}


@torch.no_grad()
def test_one_layer_used_twice_reads_its_own_output_each_time():
    layer = nn.Conv2d(4, 4, 3, padding=1).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2, "dora": True}]}, name="a")
    randomised(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    changed = dora_weight(layer, layer.convpeft.a)
    once = nn.functional.conv2d(x, changed, layer.bias, padding=1)
    assert_relative(model(x), nn.functional.conv2d(once.relu(), changed, layer.bias, padding=1))
    assert isinstance(Host(layer.weight, layer.bias, x), tuple)
