"""The adapter contract: every registered kind, at each of its places, on every geometry it serves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters import Adapter
from convpeft.injection import install
from tests.cases import (
    CASES,
    DTYPES,
    KINDS,
    LINEARS,
    OPTIONS,
    SERVED,
    VARIANTS,
    OwnConstructorConv,
    Variant,
    adapted,
    assert_relative,
    bits,
    named,
    net,
    randomised,
    same_bits,
)
from tests.references import adapters as formulas
from tests.references import convolution as reference
from tests.references import low_rank, visual

CONTRACT = pytest.mark.parametrize(("case", "variant"), named(SERVED))


def _half(pairs: list, rows: list) -> list:
    """Mark every second pair nightly, as on a chessboard: each case meets half of the kinds, each kind half of the cases."""
    cases, variants = (list({id(part): part for part in side}) for side in zip(*pairs, strict=True))
    return [
        pytest.param(
            *row.values, id=row.id, marks=[pytest.mark.nightly] * ((cases.index(id(a)) + variants.index(id(b))) % 2)
        )
        for (a, b), row in zip(pairs, rows, strict=True)
    ]


HALF = _half(SERVED, named(SERVED))
GROUPED = [
    (case, variant)
    for case, variant in SERVED
    if variant.place == "parallel" and getattr(case.build(), "groups", 1) > 1
]
IN_SHORT = pytest.mark.parametrize("variant", named(VARIANTS))


def reference_update(layer: nn.Module, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """Return ``f`` by the formula of the adapter's kind, for the input of its place."""
    return FORMULAS[adapter.kind](layer, adapter, x)


def _lora(layer, adapter, x):
    update = _low_rank(layer, adapter, x)
    if not adapter.options.bias:
        return update
    return update + adapter.bias.detach().double().view(-1, *[1] * (0 if adapter.site.geometry.linear else 2))


def _low_rank(layer, adapter, x):
    options = adapter.options
    if options.dora:
        return low_rank.dora(layer, adapter, x)
    scale = (options.alpha or options.rank) / (math.sqrt(options.rank) if options.rslora else options.rank)
    if adapter.site.geometry.linear:
        return formulas.lora_linear(x, adapter.down, adapter.up, scale)
    if adapter.site.place == "output":
        return scale * reference.pointwise(reference.pointwise(x, adapter.down), adapter.up)
    return formulas.lora_conv(layer, x, adapter.down, adapter.up, scale)


def _rep_mona(layer, adapter, x):
    parallel = adapter.site.place == "parallel"
    grid = reference.grid_of(layer if parallel else nn.Conv2d(1, 1, 1), x)
    branches = [branch.weight for branch in adapter.branches]
    norms = [branch.norm for branch in adapter.branches] if adapter.options.branch_norm else []
    groups = layer.groups if parallel else 1
    return formulas.rep_mona(grid, x, adapter.down, branches, norms, adapter.mix, adapter.up, adapter.scale, groups)


def _bottleneck(layer, adapter, z):
    return formulas.bottleneck(z, adapter.down, adapter.norm, adapter.up, adapter.gate)


def _hierarchical(layer, adapter, z):
    return visual.hierarchical(z, adapter, adapter.options.attention, adapter.options.cells)


def _mona(layer, adapter, z):
    return visual.mona(z, adapter)


def _moe_rep_mona(layer, adapter, x):
    parallel = adapter.site.place == "parallel"
    grid = reference.grid_of(layer if parallel else nn.Conv2d(1, 1, 1), x)
    return visual.moe_rep_mona(x, adapter, grid, layer.groups if parallel else 1, adapter.options.top_k)


def _conv_lora(layer, adapter, x):
    return low_rank.conv_lora(layer, adapter, x)


FORMULAS = {
    "lora": _lora,
    "conv_lora": _conv_lora,
    "rep_mona": _rep_mona,
    "bottleneck": _bottleneck,
    "hierarchical": _hierarchical,
    "mona": _mona,
    "moe_rep_mona": _moe_rep_mona,
}


def test_every_kind_is_in_the_contract():
    assert set(KINDS) == set(OPTIONS), "give the new kind options in cases.py and a reference here"


@CONTRACT
def test_fresh_adapters_change_no_bit(case, variant):
    model, x = net(case), case.input()
    before = model(x)
    convpeft.inject(model, {"rules": [variant.rule]})
    assert convpeft.check(model, x).ok
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("case", "variant"), HALF)
@torch.no_grad()
def test_forward_is_the_formula(case, variant):
    model, x = adapted(case, variant), case.input()
    own = reference.run(model.layer, x)
    update = reference_update(model.layer, model.layer.convpeft.a, x if variant.place == "parallel" else own)
    assert float(update.abs().max()) > 1e-3
    assert_relative(model.layer(x), own + update)


@pytest.mark.parametrize(("case", "variant"), HALF)
def test_gradients_reach_the_adapter_alone(case, variant):
    model, x = adapted(case, variant), case.input()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".convpeft." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name


@pytest.mark.parametrize(("case", "variant"), HALF)
def test_eject_gives_the_very_layer_back(case, variant):
    model, x = net(case), case.input()
    model.stem.requires_grad_(False)
    layer, kind, before, output = model.layer, type(model.layer), bits(model), model(x)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    objects = [*model.parameters(), *model.buffers()]
    convpeft.inject(model, {"rules": [variant.rule]})
    assert type(model.layer) is not kind
    assert isinstance(model.layer, kind)
    randomised(model)
    assert convpeft.eject(model) is model
    assert model.layer is layer
    assert type(layer) is kind
    assert same_bits(before, bits(model))
    assert torch.equal(model(x), output)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
    assert "convpeft" not in repr(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@IN_SHORT
@torch.no_grad()
def test_dtype_follows_the_host(variant, dtype):
    case = CASES["3x3"]
    model, x = adapted(case, variant, dtype=dtype), case.input(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = model.layer(x)
    exact = model.double().layer(x.double())
    assert got.dtype == dtype
    # bfloat16 rounds each of the few hidden maps in the detour to 8 bits, float16 to 11: a handful of half-ulps of the
    # largest value; the double model has the very same (already rounded) weights
    assert_relative(got.double(), exact, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("case", "variant"), named(GROUPED))
@torch.no_grad()
def test_groups_never_leak(case, variant):
    model, x = adapted(case, variant), case.input()
    layer = model.layer
    inside, outside = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    moved = x.clone()
    moved[:, :inside] += torch.randn_like(moved[:, :inside])  # the first group only
    with convpeft.disabled(model):
        bare = [layer(each) for each in (x, moved)]
    before, after = (layer(each) - own for each, own in zip((x, moved), bare, strict=True))  # what the adapter adds
    assert torch.equal(after[:, outside:], before[:, outside:])
    assert float((after - before)[:, :outside].abs().max()) > 1e-3


def failing_once(function):
    """Return the function, which fails on its first call."""
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError("in the middle")
        return function(*arguments, **options)

    return failing


@IN_SHORT
def test_a_failed_inject_leaves_every_bit(variant, monkeypatch):
    case = CASES["3x3"]
    model = adapted(case, variant)
    before, modules, names = bits(model), [type(m) for m in model.modules()], convpeft.active_adapters(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]

    for step in ("switch", "train_only", "protect"):  # in the middle, and at the end
        with monkeypatch.context() as patch:
            patch.setattr(install, step, failing_once(getattr(install, step)))
            with pytest.raises(MemoryError, match="in the middle"):
                convpeft.inject(model, {"rules": [variant.rule], "norm": "adapt"}, name="second")
        assert same_bits(before, bits(model))
        assert [type(m) for m in model.modules()] == modules
        assert convpeft.active_adapters(model) == names
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
    convpeft.inject(model, {"rules": [variant.rule]}, name="second")


def test_an_inject_into_a_model_that_lost_a_layer_leaves_every_bit():
    model = net(CASES["3x3"])
    convpeft.inject(model, {"rules": [{"match": "{stem,layer}", "kind": "lora"}]})
    model.stem = nn.Conv2d(4, 4, 1).double()
    before = bits(model)
    with pytest.raises(convpeft.StateError, match="'stem' was adapted and has been replaced by a plain Conv2d"):
        convpeft.inject(model, {"rules": [{"match": "layer", "kind": "lora"}]}, name="second")
    assert same_bits(before, bits(model))
    with pytest.raises(convpeft.StateError, match="'stem' was adapted"):
        convpeft.set_active(model, None)
    assert model.layer.convpeft.active == ("default",)


@IN_SHORT
def test_a_failed_first_inject_leaves_a_plain_model(variant, monkeypatch):
    model = net(CASES["3x3"])
    before, modules = bits(model), [type(m) for m in model.modules()]

    monkeypatch.setattr(install, "protect", failing_once(install.protect))  # the last step
    with pytest.raises(MemoryError, match="in the middle"):
        convpeft.inject(model, {"rules": [variant.rule]})
    assert same_bits(before, bits(model))
    assert [type(m) for m in model.modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("variant", "why"),
    [(v, "need an image|needs an image") for v in VARIANTS if not v.serves(LINEARS[0])],
    ids=[v.name for v in VARIANTS if not v.serves(LINEARS[0])],
)
@pytest.mark.parametrize("case", named(LINEARS))
def test_refusals_come_at_plan_time(case, variant, why):
    model = net(case)
    before = bits(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(
            convpeft.SpecError, match=rf"rule 1: layer \(Linear\) cannot take kind '{variant.kind}'.*({why})"
        ):
            function(model, {"rules": [variant.rule]})
    assert same_bits(before, bits(model))


def test_reduction_beyond_the_channels_is_refused_at_plan_time():
    with pytest.raises(convpeft.SpecError, match="reduction 7 leaves nothing of its 6 channels"):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "bottleneck", "reduction": 7}]})


@IN_SHORT
def test_dropout_acts_in_training_only(variant):
    options = {**variant.options, "dropout": 0.5}
    case = CASES["3x3"]
    model, x = adapted(case, Variant(variant.kind, variant.place, options)), case.input()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("place", ["parallel", "output"])
def test_branch_norm_learns_statistics_in_training(place):
    case = CASES["3x3"]
    options = {"rank": 2, "kernel_sizes": [3, 5], "branch_norm": True}
    model, x = adapted(case, Variant("rep_mona", place, options)), case.input()
    norm = model.layer.convpeft.a.branches[0].norm
    before = norm.running_mean.clone()
    model(x)
    assert torch.equal(norm.running_mean, before)
    model.train()
    model(x)
    assert not torch.equal(norm.running_mean, before)
    assert not model.norm.training  # the base's own norm is held


def test_a_layer_with_its_own_constructor_keeps_its_class_and_fields():
    model = adapted(CASES["own-constructor"], VARIANTS[0])
    assert isinstance(model.layer, OwnConstructorConv)
    assert model.layer.depth_first is True
    assert model.layer.in_channels == 4
