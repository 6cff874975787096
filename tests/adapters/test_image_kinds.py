"""What the kinds that work on maps of pixels have in common: how they are compiled, stored and fed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import convpeft
from tests.cases import CASES, VARIANTS, adapted, assert_relative, named

KINDS = ("hierarchical", "mona", "moe_rep_mona")
IN_SHORT = pytest.mark.parametrize("variant", named([v for v in VARIANTS if v.kind in KINDS]))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of what trains, and forget them."""
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return found


@IN_SHORT
def test_they_compile_whole_in_training_and_eval(variant):
    model, x = adapted(CASES["3x3"], variant), CASES["3x3"].input()
    torch.compiler.reset() if hasattr(torch.compiler, "reset") else torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mode in (True, False):
        model.train(mode)
        results = []
        for function in (model, compiled):
            output = function(x)
            output.square().sum().backward()
            results.append([output.detach(), *gradients(model)])
        for got, expected in zip(*results, strict=True):
            assert_relative(got, expected)


@pytest.mark.nightly
@IN_SHORT
@torch.no_grad()
def test_they_export(variant):
    model, x = adapted(CASES["3x3"], variant), CASES["3x3"].input()
    assert_relative(torch.export.export(model, (x,)).module()(x), model(x))
    assert_relative(torch.jit.trace(model, x)(x), model(x))


@IN_SHORT
@torch.no_grad()
def test_memory_formats_make_no_difference(variant):
    model, x = adapted(CASES["3x3"], variant), CASES["3x3"].input()
    expected = model(x)
    assert_relative(model(x.to(memory_format=torch.channels_last)), expected)
    assert_relative(model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)), expected)


@IN_SHORT
@torch.no_grad()
def test_one_image_without_a_batch_axis(variant):
    layer, x = adapted(CASES["3x3"], variant).layer, CASES["3x3"].input()
    assert_relative(layer(x[0]), layer(x[:1])[0])


@IN_SHORT
def test_an_empty_batch_gives_an_empty_map(variant):
    layer, x = adapted(CASES["3x3"], variant).layer.train(), CASES["3x3"].input()[:0]
    output = layer(x)
    assert output.shape == (0, 6, 9, 8)
    output.sum().backward()
    assert all(not p.grad.any() for p in layer.parameters() if p.requires_grad)


@IN_SHORT
@torch.no_grad()
def test_one_pixel_and_odd_maps(variant):
    layer = adapted(CASES["3x3"], variant).layer
    for size in ((1, 1), (1, 5), (7, 3)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        assert layer(x).shape == (2, 6, *size)
        assert layer(x).isfinite().all()


@IN_SHORT
def test_autocast_gives_close_results(variant):
    model, x = adapted(CASES["3x3"], variant, dtype=torch.float32), CASES["3x3"].input(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    # every hidden map is rounded to 8 bits on the way, about eight times: a few per cent of the largest value
    assert_relative(output.detach().float(), model(x).detach(), 16 * torch.finfo(torch.bfloat16).eps)


@IN_SHORT
def test_the_users_own_checkpointing_changes_no_gradient(variant):
    model, x = adapted(CASES["3x3"], variant).train(), CASES["3x3"].input().requires_grad_()
    results = []
    for function in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        function(x).square().sum().backward()
        results.append(gradients(model))
    for got, expected in zip(*results, strict=True):
        assert_relative(got, expected)


@IN_SHORT
@torch.no_grad()
def test_a_file_gives_the_same_bits(variant, tmp_path):
    case = CASES["3x3"]
    model, x = adapted(case, variant), case.input()
    base = copy.deepcopy(model)
    convpeft.eject(base)
    convpeft.save_adapter(model, tmp_path / "a.safetensors")
    convpeft.load_adapter(base, tmp_path / "a.safetensors")
    assert torch.equal(base(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_refused_with_a_sentence(kind):
    model = nn.ModuleDict({"layer": nn.LayerNorm(6)})
    with pytest.raises(convpeft.SpecError, match=r"need an image \(N, C, H, W\), and this (output|layer)'s channels"):
        convpeft.plan(model, {"rules": [{"match": "layer", "kind": kind, "place": "output"}]})


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_survives_large_inputs(kind):
    """A map of a thousand in every channel: attention scores and norms stay finite in float16."""
    model = nn.ModuleDict({"layer": nn.Identity()})
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": kind, "place": "output", "channels": 32}]})
    model.half()
    assert model.layer(torch.full((1, 32, 12, 12), 1000.0, dtype=torch.float16)).isfinite().all()
