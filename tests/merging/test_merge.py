"""Merged layers compute what adapted ones did: whole tensors, every geometry, every form."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import (
    LAYERS,
    SERVED,
    VARIANTS,
    Case,
    Variant,
    adapted,
    assert_relative,
    bits,
    named,
    net,
    randomised,
    same_bits,
)

CASES = {case.name: case for case in LAYERS}
CLAMPED = "tf-same-1x1-stride2"
REP_MONA = Variant("rep_mona", "parallel", {"rank": 2, "kernel_sizes": [3, 7]})
LORA = Variant("lora", "parallel", {"rank": 3})
LORA_OUT = Variant("lora", "output", {"rank": 3})
REP_MONA_OUT = Variant("rep_mona", "output", {"rank": 2, "kernel_sizes": [3]})
LINEAR_KINDS = [(case, variant) for case, variant in SERVED if variant.kind in ("lora", "rep_mona")]
MERGEABLE = [
    (case, variant)
    for case, variant in LINEAR_KINDS
    if not (case.name == CLAMPED and variant.kind == "rep_mona" and variant.place == "parallel")
]


def assert_plain(model: nn.Module) -> None:
    """Nothing of convpeft is left: no key, no class, no attribute."""
    assert not [key for key in model.state_dict() if "convpeft" in key]
    assert not [name for name, _ in model.named_modules() if "convpeft" in name]
    assert not [
        type(m)
        for m in model.modules()
        if type(m).__name__.startswith("Adapted") or type(m).__module__.startswith("convpeft")
    ]
    assert not [key for module in model.modules() for key in vars(module) if "convpeft" in key]


@pytest.mark.parametrize("form", ["auto", "single", "factored"])
@pytest.mark.parametrize(("case", "variant"), named(MERGEABLE))
@torch.no_grad()
def test_merged_is_adapted(case, variant, form):
    model, x = adapted(case, variant), case.input()
    expected, before = model.layer(x), bits(model)
    merged = convpeft.merge(model, form=form)
    assert_relative(merged.layer(x), expected)
    assert_relative(merged(x), model(x), 1e-11)  # the norm after the layer divides by a small spread
    assert type(merged.layer) is type(net(case).layer)
    assert_plain(merged)
    assert same_bits(before, bits(model))
    assert torch.equal(model.layer(x), expected)


@pytest.mark.parametrize(("case", "variant"), named(MERGEABLE))
def test_the_plan_tells_what_merge_does(case, variant):
    model = adapted(case, variant)
    rows = {form: convpeft.plan_merge(model, form=form).rows for form in ("auto", "single", "factored")}
    for form, (row,) in rows.items():
        assert row.name == "layer"
        assert row.form in (("absorbed", "single", "factored") if form == "auto" else ("absorbed", form)), row
        cost = row.macs_factored if row.form == "factored" else row.macs_single
        assert row.macs_after == cost
        chains = {name for name, _ in convpeft.merge(model, form=form).layer.named_children()}
        beside_or_after = row.form == "factored" or (
            row.form == "single" and row.kernel_before != row.kernel_after and "+" in row.kernel_after
        )
        assert bool(chains) == beside_or_after
    (auto,), (single,), (factored,) = rows["auto"], rows["single"], rows["factored"]
    assert auto.macs_after == min(single.macs_after, factored.macs_after)
    assert (single.macs_single, single.macs_factored) == (auto.macs_single, auto.macs_factored)


def test_a_7x7_beside_a_1x1_becomes_a_chain_and_not_a_49_times_dearer_kernel():
    case = Case("wide", lambda: nn.Conv2d(32, 32, 1), (1, 32, 9, 8))
    model = adapted(case, Variant("rep_mona", "parallel", {"rank": 4, "kernel_sizes": [3, 5, 7]}))
    plan = convpeft.plan_merge(model)
    (row,) = plan.rows
    assert (row.form, row.macs_before, row.macs_single) == ("factored", 32 * 32, 49 * 32 * 32)
    assert row.macs_after == 32 * 32 + 32 * 2 * 4 + 2 * 4 * 49 + 2 * 4 * 32
    assert "one kernel (32→32 7×7) would cost more" in str(plan)
    assert convpeft.merge(model).layer.kernel_size == (1, 1)
    assert convpeft.merge(model, form="single").layer.kernel_size == (7, 7)


def test_plan_merge_touches_nothing():
    model = adapted(CASES["3x3"], REP_MONA)
    objects = {id(thing) for thing in [*model.modules(), *model.parameters(), *model.buffers()]}
    before, classes, x = bits(model), [type(m) for m in model.modules()], CASES["3x3"].input()
    output = model(x)
    for form in ("auto", "single", "factored"):
        convpeft.plan_merge(model, form=form)
    assert same_bits(before, bits(model))
    assert [type(m) for m in model.modules()] == classes
    assert {id(thing) for thing in [*model.modules(), *model.parameters(), *model.buffers()]} == objects
    assert torch.equal(model(x), output)


@pytest.mark.parametrize("form", ["single", "factored"])
@pytest.mark.parametrize(
    "name", ["3x3", "same", "reflect-stride2", "groups2", "tf-same-stride2", "2x2-stride2", "same-even"]
)
@torch.no_grad()
def test_several_active_adapters_merge_as_their_sum(name, form):
    case = CASES[name]
    kinds = (REP_MONA, LORA, Variant("lora", "parallel", {"rank": 2, "pointwise": True}), REP_MONA)
    model, x = adapted(case, *kinds), case.input()
    merged = convpeft.merge(model, form=form)
    assert_relative(merged.layer(x), model.layer(x))
    assert_plain(merged)


@torch.no_grad()
def test_a_chain_beside_is_probed_on_the_layers_input_whichever_adapter_came_first():
    case = CASES["3x3"]
    model, x = adapted(case, LORA_OUT, REP_MONA), case.input()
    assert_relative(convpeft.merge(model, form="factored").layer(x), model.layer(x))


@torch.no_grad()
def test_only_active_adapters_are_merged():
    case = CASES["3x3"]
    model, x = adapted(case, LORA, REP_MONA), case.input()
    convpeft.set_active(model, "a")
    expected = model.layer(x)
    assert_relative(convpeft.merge(model).layer(x), expected)
    convpeft.set_active(model, None)
    bare = convpeft.merge(model)
    assert torch.equal(bare.layer(x), model.layer(x))
    assert_plain(bare)


@torch.no_grad()
def test_adapters_beside_and_on_the_output_merge_together_where_they_fold():
    case = CASES["3x3"]
    model, x = adapted(case, LORA, LORA_OUT), case.input()
    assert_relative(convpeft.merge(model).layer(x), model.layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["single", "factored"])
@pytest.mark.parametrize("variant", named([v for v in VARIANTS if v.merges]))
@torch.no_grad()
def test_lower_precision_merges_cast_once(variant, form, dtype):
    case = CASES["3x3"]
    model = adapted(case, variant, dtype=dtype)
    merged = convpeft.merge(model, form=form)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    exact = convpeft.merge(copy.deepcopy(model).double(), form=form)
    for got, expected in zip(merged.layer.parameters(), exact.layer.parameters(), strict=True):
        assert torch.equal(got, expected.to(dtype))
    if dtype == torch.float32:
        x = case.input(dtype)
        torch.testing.assert_close(merged.layer(x), model.layer(x))


@pytest.mark.parametrize("branch_norm", [False, True])
@torch.no_grad()
def test_a_chain_of_large_and_small_factors_is_cast_within_the_range_of_half_precision(branch_norm):
    options = {"rank": 3, "kernel_sizes": [3, 5], "branch_norm": branch_norm}
    model = adapted(CASES["3x3"], Variant("rep_mona", "parallel", options), dtype=torch.float16)
    adapter = model.layer.convpeft.a
    adapter.down.mul_(2**8)
    adapter.up.mul_(2**-8)
    adapter.scale.fill_(2**-10)
    model.layer.weight.zero_()  # so that the chain is all there is
    model.layer.bias.zero_()
    x = torch.randn(16, 4, 9, 8, dtype=torch.float16)
    exact = copy.deepcopy(model).double().layer(x.double())
    merged = convpeft.merge(model, form="factored").layer
    assert float((merged(x).double() - exact).abs().max()) <= 2 * 2**-10 * float(exact.abs().max())


@torch.no_grad()
def test_inplace_keeps_the_objects_and_the_flags():
    case = CASES["3x3"]
    model, x = net(case), case.input()
    model.stem.requires_grad_(False)
    layer, norm = model.layer, model.norm
    convpeft.inject(model, {"rules": [REP_MONA.rule]})
    randomised(model)
    expected = model.layer(x)
    assert convpeft.merge(model, inplace=True, form="single") is model
    assert (model.layer, model.norm) == (layer, norm)
    assert_relative(model.layer(x), expected)
    assert_plain(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_merging_twice_is_told():
    merged = convpeft.merge(adapted(CASES["3x3"], LORA))
    for function in (convpeft.merge, convpeft.plan_merge):
        with pytest.raises(convpeft.StateError, match="this Net has no adapters"):
            function(merged)


def test_unknown_forms_are_named():
    model = adapted(CASES["3x3"], LORA)
    for function in (convpeft.merge, convpeft.plan_merge):
        with pytest.raises(convpeft.OptionError, match="form must be one of auto, single, factored, not 'double'"):
            function(model, form="double")


@pytest.mark.parametrize("variant", named([REP_MONA, REP_MONA_OUT]))
@torch.no_grad()
def test_a_factored_model_copies_and_travels(variant):
    case = CASES["3x3"]
    merged, x = convpeft.merge(adapted(case, variant), form="factored"), case.input()
    expected = merged(x)
    file = io.BytesIO()
    torch.save(merged, file)
    file.seek(0)
    for copied in (copy.deepcopy(merged), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), expected)
        assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in merged.parameters()})
        for parameter in copied.layer.parameters():
            parameter.zero_()
        assert torch.equal(merged(x), expected)
        assert not copied.layer(x).any()


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@torch.no_grad()
def test_fusing_a_norm_into_a_factored_conv_is_never_silent(bias):
    case = CASES["3x3" if bias else "3x3-no-bias"]
    merged, x = convpeft.merge(adapted(case, REP_MONA), form="factored"), case.input()
    merged.norm.running_mean.normal_()
    expected = merged.norm(merged.layer(x))
    with pytest.raises(convpeft.HostError, match="was fused with a norm after a factored merge"):
        torch.nn.utils.fuse_conv_bn_eval(merged.layer, merged.norm)(x)
    single = convpeft.merge(adapted(case, REP_MONA), form="single")
    torch.nn.utils.fuse_conv_bn_eval(single.layer, single.norm)(x)
    assert torch.equal(merged.norm(merged.layer(x)), expected)


class Scaled(nn.Module):
    """A block with more than one output."""

    def __init__(self, pack) -> None:
        super().__init__()
        self.conv, self.pack = nn.Conv2d(4, 6, 3, padding=1), pack

    def forward(self, x):
        return self.pack(self.conv(x))


def pair(z):
    return z.sigmoid(), z


def mapping(z):
    return {"maps": z.relu(), "other": z}


def listed(z):
    return [z, 2 * z]


@pytest.mark.parametrize("form", ["auto", "single", "factored"])
@pytest.mark.parametrize(("pack", "entry"), [(pair, 1), (mapping, "maps"), (listed, 0)], ids=["tuple", "dict", "list"])
@pytest.mark.parametrize("variant", named([LORA_OUT, REP_MONA_OUT]))
@torch.no_grad()
def test_output_hosts_merge_into_a_chain_after_them(variant, pack, entry, form):
    model, x = nn.ModuleDict({"layer": Scaled(pack)}).double().eval(), torch.randn(2, 4, 9, 8).double()
    convpeft.inject(model, {"rules": [{**variant.rule, "output": entry, "channels": 6}]}, example_inputs=None)
    randomised(model)
    block = model["layer"]
    expected = block(x)
    merged = convpeft.merge(model, form=form)["layer"]
    got = merged(x)
    assert type(got) is type(expected)
    keys = expected if isinstance(expected, dict) else range(len(expected))
    for key in keys:
        assert_relative(got[key], expected[key], 1e-12 if key == entry else 0)
    assert type(merged) is Scaled
    assert_plain(merged)


class Sequence(nn.Module):
    """A Sequential as a child, with a shared last step or not."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*steps)

    def forward(self, x):
        return self.layer(x)


SEQUENCES = {
    "conv-last": lambda: Sequence(nn.ReLU(), nn.Conv2d(4, 6, 3)),
    "relu-last": lambda: Sequence(nn.Conv2d(4, 6, 3), nn.ReLU()),
    "norm-last": lambda: Sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "nested": lambda: Sequence(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1)))),
}


@pytest.mark.parametrize("form", ["auto", "factored"])
@pytest.mark.parametrize("variant", named([LORA_OUT, REP_MONA_OUT]))
@pytest.mark.parametrize("name", list(SEQUENCES))
@torch.no_grad()
def test_a_sequential_stays_a_sequential(name, variant, form):
    model, x = SEQUENCES[name]().double().eval(), torch.randn(2, 4, 9, 8).double()
    steps = len(model.layer)
    convpeft.inject(model, {"rules": [variant.rule]}, example_inputs=x)
    randomised(model)
    merged = convpeft.merge(model, form=form)
    assert_relative(merged(x), model(x))
    assert type(merged.layer) is nn.Sequential
    assert len(merged.layer) == steps
    assert_plain(merged)


@pytest.mark.parametrize("place", ["parallel", "output"])
@pytest.mark.parametrize("form", ["single", "factored"])
@torch.no_grad()
def test_branch_norms_fold_with_their_statistics(place, form):
    case = CASES["stride2"]
    variant = Variant("rep_mona", place, {"rank": 3, "kernel_sizes": [1, 3, 5], "branch_norm": True})
    model, x = adapted(case, variant), case.input()
    model.train()
    for _ in range(3):
        model(3 * torch.randn(case.shape).double() + 1)
    model.eval()
    assert_relative(convpeft.merge(model, form=form).layer(x), model.layer(x))


@pytest.mark.parametrize("variant", named([REP_MONA, REP_MONA_OUT, LORA]))
@pytest.mark.parametrize("form", ["single", "factored"])
@torch.no_grad()
def test_hooks_of_the_user_see_the_merged_output(variant, form):
    case = CASES["3x3"]
    model, x = adapted(case, variant), case.input()
    seen: list[torch.Tensor] = []
    model.layer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    expected = model.layer(x)
    merged = convpeft.merge(model, form=form)
    seen.clear()
    got = merged.layer(x)
    assert len(seen) == 1
    assert torch.equal(seen[0], got)
    assert_relative(got, expected)


@torch.no_grad()
def test_a_layer_used_under_two_names_is_merged_once():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"layer": shared, "again": shared}).double().eval()
    convpeft.inject(model, {"rules": [REP_MONA.rule]})
    randomised(model)
    x = torch.randn(2, 4, 9, 8).double()
    expected = model["again"](x)
    merged = convpeft.merge(model, form="single")
    assert merged["layer"] is merged["again"]
    assert_relative(merged["again"](x), expected)
    assert_plain(merged)
