"""The plain chains of a factored merge: a merged model takes another adapter and merges again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft.hosts.chains import BESIDE, carries_chains
from tests.cases import CASES, Variant, assert_relative, bits, named, net, randomised, same_bits

REP_MONA = Variant("rep_mona", "parallel", {"rank": 2, "kernel_sizes": [3, 7]})
WITH_NORM = Variant("rep_mona", "parallel", {"rank": 2, "kernel_sizes": [3, 7], "branch_norm": True})
LORA = Variant("lora", "parallel", {"rank": 3})
FIRST = [CASES["3x3"], CASES["3x3-no-bias"], CASES["stride2"], CASES["groups2"], CASES["tf-same"]]


def merged_once(case, variant=REP_MONA, form="factored") -> nn.Module:
    """Return the case's net with one adapter merged into a chain, ready for the next."""
    model = net(case)
    convpeft.inject(model, {"rules": [variant.rule]})
    return convpeft.merge(randomised(model), form=form)


@pytest.mark.parametrize("form", ["auto", "single", "factored"])
@pytest.mark.parametrize("variant", named([REP_MONA, WITH_NORM, LORA]))
@pytest.mark.parametrize("case", named(FIRST))
@torch.no_grad()
def test_a_second_adapter_merges_beside_the_first_ones_chain(case, variant, form):
    model, x = merged_once(case), case.input()
    assert carries_chains(model.layer)
    before = model.layer(x)
    convpeft.inject(model, {"rules": [variant.rule]})
    assert torch.equal(model.layer(x), before)
    expected = randomised(model).layer(x)
    plain = convpeft.merge(model, form=form)
    assert float((expected - before).abs().max()) > 1e-3
    assert_relative(plain.layer(x), expected)
    assert len(plain.layer._forward_hooks) == 1
    assert plain.layer.bias is None
    assert "convpeft" not in str(list(plain.state_dict()))


@torch.no_grad()
def test_a_chains_layers_carry_no_chain_of_their_own():
    model = merged_once(CASES["tf-same"])
    convpeft.inject(model, {"rules": [REP_MONA.rule]})
    plain = convpeft.merge(randomised(model), form="factored")
    steps = [step for chain in plain.layer._modules[BESIDE] for step in chain]
    assert len(steps) == 6
    assert not any(step._modules or step._forward_hooks for step in steps)


@pytest.mark.parametrize("place", ["parallel", "output"])
def test_an_adapter_on_the_output_would_not_see_the_chain_and_is_refused(place):
    case = CASES["3x3"]
    variant = Variant("rep_mona", place, {"rank": 2, "kernel_sizes": [3, 7]})
    model = merged_once(case, variant)
    if not carries_chains(model.layer):  # 1x1-bordered output chains may fold into the layer itself
        pytest.fail("the merge was expected to leave a chain")
    before = bits(model)
    with pytest.raises(convpeft.SpecError, match="earlier factored merge left plain chains here"):
        convpeft.inject(model, {"rules": [{"match": "layer", "kind": "bottleneck"}]})
    assert same_bits(before, bits(model))


class Standardised(nn.Conv2d):
    """A conv whose forward standardises its weight: no merge into the weight is right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


def test_the_plan_of_a_merge_has_been_probed_as_the_merge_is():
    model = nn.Sequential(Standardised(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)).double()
    convpeft.inject(model, {"rules": [{"match": "*", "kind": "lora", "rank": 2}]})
    randomised(model)
    refused = convpeft.plan_merge(model, form="single").refused
    assert list(refused) == ["0"]
    assert "not the convolution of its weight alone" in refused["0"]
    with pytest.raises(convpeft.MergeError) as told:
        convpeft.merge(model, form="single")
    assert told.value.reasons == refused
