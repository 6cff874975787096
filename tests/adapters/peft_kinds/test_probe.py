"""What a method gets wrong on a layer is seen before anything is touched, and said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters.peft_kinds import layers
from convpeft.adapters.peft_kinds import probe as probing
from convpeft.adapters.peft_kinds.probe import probe
from tests.adapters.peft_kinds.methods import REFUSED
from tests.cases import CASES, LAYERS, bits, named, net, same_bits


def test_a_plan_made_without_gradients_says_the_same():
    model = net(LAYERS[0])
    probe.cache_clear()
    with torch.no_grad():
        assert convpeft.plan(model, {"rules": [{"match": "layer", "kind": "peft:loha", "r": 3}]}).layers


@pytest.mark.parametrize(("case", "kind"), named(REFUSED))
def test_what_peft_gets_wrong_is_refused_at_plan_time(case, kind):
    model = net(case)
    before = bits(model)
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(
            convpeft.SpecError, match=rf"rule 1: layer \(\w+\) cannot take kind '{kind.kind}': peft's \w+ (does|gives)"
        ):
            function(model, {"rules": [kind.rule]})
    assert same_bits(before, bits(model))


REASONS = [
    ("c3a", {"block_size": 2}, "linear", "is not the identity when fresh: it changes the weight by up to"),
    ("c3a", {"block_size": 2, "init_weights": True}, "linear", "does not compute the convolution"),  # float32 inside
    ("loha", {"init_weights": False}, "3x3", "is not the identity when fresh"),
    ("hra", {"r": 3}, "3x3", "is not the identity when fresh"),
    ("oft", {"r": 2, "oft_block_size": 0}, "3x3", "does not compute the convolution with its changed weight"),
    ("oft", {"oft_block_size": 3}, "1x1", "would not take the options as they are: .*Adjusted `oft_block_size`"),
    ("oft", {"r": 2, "oft_block_size": 0, "coft": True}, "1x1", "gives its parameters no gradient|does not compute"),
    ("hira", {"r": 2}, "groups2", "does not serve it: NotImplementedError: HiRA does not support .*groups > 1"),
    ("boft", {"boft_block_size": 7}, "3x3", r"does not serve it: ValueError: .*must be divisible"),
    ("lora", {"r": 2, "use_dora": True}, "3x3", "does not compute the convolution|starts from the layer's own weight"),
    ("osf", {}, "linear", "starts from the layer's own weight"),
    ("pvera", {"r": 2}, "linear", "does not compute the convolution with its changed weight"),
    ("road", {"group_size": 2}, "linear", "works on activations and offers no delta weight"),
    ("vera", {"r": 2}, "3x3", "does not serve it"),
    (
        "loha",
        {"r": 65536, "use_effective_conv2d": True},
        "3x3",
        r"would need [\d,]+ numbers here; at most 67,108,864 are allowed",
    ),
]


@pytest.mark.parametrize(("method", "options", "name", "why"), REASONS, ids=[f"{m}-{o}" for m, o, _, _ in REASONS])
def test_refusals_say_what_was_seen(method, options, name, why):
    rule = {"match": "layer", "kind": f"peft:{method}", **options}
    with pytest.raises(convpeft.SpecError, match=rf"cannot take kind 'peft:{method}': peft's {method} .*({why})"):
        convpeft.plan(net(CASES[name]), {"rules": [rule]})


def test_a_layer_that_is_not_its_weights_convolution_is_refused():
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(4, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    for rule in ({"kind": "peft:loha", "r": 2}, {"kind": "lora", "dora": True}):
        with pytest.raises(convpeft.SpecError, match=r"forward is not the convolution of its weight alone.*differ by"):
            convpeft.plan(model, {"rules": [{"match": "0", **rule}]})
        with pytest.raises(convpeft.SpecError, match="which is no plain parameter here"):
            convpeft.plan(model, {"rules": [{"match": "1", **rule}]})
    assert convpeft.plan(model, {"rules": [{"match": "*", "kind": "lora"}]}).layers


def test_the_probe_leaves_the_random_state_alone():
    probe.cache_clear()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "stem", "kind": "peft:loha"}]})
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    probe.cache_clear()
    model = net(CASES["3x3"])
    before = torch.get_rng_state()
    convpeft.plan(model, {"rules": [{"match": "layer", "kind": "peft:loha"}]})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_method_that_keeps_a_choice_outside_its_tensors_is_seen(monkeypatch):
    def wrap(method, settings, layer):
        wrapped = layers.wrap(method, settings, layer)
        wrapped.__dict__["choice"] = torch.rand(())
        return wrapped

    def change_of(method, wrapped, weight, bias):
        change = layers.change_of(method, wrapped, weight, bias)
        return layers.Change(change.weight * wrapped.choice, change.bias)

    shape = convpeft.ConvGeometry(4, 6, (3, 3))
    probing._check_round_trip("loha", {"r": 2}, shape)
    monkeypatch.setattr(probing, "wrap", wrap)
    monkeypatch.setattr(probing, "change_of", change_of)
    with pytest.raises(probing._Seen, match="keeps a random choice outside its tensors"):
        probing._check_round_trip("loha", {"r": 2}, shape)
