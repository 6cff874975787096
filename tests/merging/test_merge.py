"""Merged layers compute what adapted ones did: whole tensors, every geometry, every form."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import CASES, VARIANTS, Variant, adapted, assert_relative, bits, named, net, randomised, same_bits
from tests.merging.layers import FORMS, LORA, LORA_OUT, MERGEABLE, REP_MONA, REP_MONA_OUT, assert_plain, in_forms


def test_each_form_sees_every_layer_and_every_variant_without_the_nightly_run():
    seen = [row.values for row in in_forms(MERGEABLE) if not row.marks]
    assert len(seen) == len(MERGEABLE)
    for form in FORMS:
        assert {case.name for case, _, its in seen if its == form} == {case.name for case, _ in MERGEABLE}
        for variant in {variant.name for _, variant in MERGEABLE}:
            assert sum(each.name == variant and its == form for _, each, its in seen) >= 10


@pytest.mark.parametrize(("case", "variant", "form"), in_forms(MERGEABLE))
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
