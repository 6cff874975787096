"""Options mean what they say, bad ones are named errors, and kinds from outside are checked as the built-in ones are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters import Adapter
from tests.cases import LAYERS, Variant, adapted, assert_relative, net
from tests.shift import Shift

CASES = {case.name: case for case in LAYERS}

BAD_OPTIONS = [
    ("lora", {"rnak": 4}, r"unknown key 'rnak' for kind 'lora'\. Closest: rank"),
    ("lora", {"rank": 0}, "rank must be above 0, not 0"),
    ("lora", {"rank": 2.5}, r"rank of kind 'lora' must be a whole number, not 2\.5"),
    ("lora", {"rank": True}, "rank of kind 'lora' must be a whole number, not True"),
    ("lora", {"rank": None}, "rank of kind 'lora' must be a whole number, not None"),
    ("lora", {"alpha": "big"}, "alpha of kind 'lora' must be .*number or null, not 'big'"),
    ("lora", {"alpha": float("nan")}, "alpha of kind 'lora' must be a finite number"),
    ("lora", {"alpha": -1}, "alpha must be above 0, not -1"),
    ("lora", {"dropout": -0.1}, r"dropout must be at least 0 and below 1, not -0\.1"),
    ("lora", {"dropout": 1}, r"dropout must be at least 0 and below 1, not 1\.0"),
    ("lora", {"rslora": 1}, "rslora of kind 'lora' must be true or false, not 1"),
    ("rep_mona", {"rank": -3}, "rank must be above 0, not -3"),
    ("rep_mona", {"kernel_sizes": [3, 4]}, "kernel_sizes must be odd and at least 1 .*, not 4"),
    ("rep_mona", {"kernel_sizes": []}, "kernel_sizes must name at least one size"),
    ("rep_mona", {"kernel_sizes": 3}, "kernel_sizes of kind 'rep_mona' must be a list of a whole number, not 3"),
    ("rep_mona", {"scale": 0}, "scale must not start at 0"),
    ("rep_mona", {"dropout": 1.5}, r"dropout must be at least 0 and below 1, not 1\.5"),
    ("bottleneck", {"reduction": 0}, "reduction must be above 0, not 0"),
    ("bottleneck", {"rank": 0}, "rank must be above 0, not 0"),
    ("bottleneck", {"norm": "batch"}, "norm of kind 'bottleneck' must be one of 'none', 'group', not 'batch'"),
    ("bottleneck", {"gate": 0.0}, "gate must not start at 0"),
    ("bottleneck", {"gate": float("inf")}, "gate of kind 'bottleneck' must be a finite number"),
    ("lora", {"rank": 0, "dropout": -1}, r"2 problems.*\n.*rank must be above 0.*\n.*dropout"),
]


@pytest.mark.parametrize(("kind", "options", "text"), BAD_OPTIONS, ids=[f"{k}-{o}" for k, o, _ in BAD_OPTIONS])
def test_bad_options_are_named(kind, options, text):
    model = net(CASES["3x3"])
    rule = {"match": "layer", "kind": kind, **options}
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.inject(model, {"rules": [rule]})
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.plan(model, convpeft.Spec(rules=[convpeft.Rule("layer", kind, **options)]))
    assert type(model.layer) is nn.Conv2d


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


@pytest.mark.usefixtures("clean_registry")
class TestRegisteredFromOutside:
    def test_it_works_as_a_built_in_kind_does(self):
        case = CASES["3x3"]
        convpeft.register_adapter("shift")(Shift)
        assert "shift" in convpeft.adapter_kinds()
        model, x = net(case), case.input()
        before = model(x)
        report = convpeft.inject(model, {"rules": [{"match": "layer", "kind": "shift", "start": 0.0}]})
        assert report.adapter_parameters == 1
        assert torch.equal(model(x), before)
        with pytest.raises(convpeft.MergeError, match="layer: written for a test"):
            convpeft.merge(model)
        assert float(convpeft.auxiliary_loss(model)) == 0

    def test_its_options_are_checked_too(self):
        convpeft.register_adapter("shift")(Shift)
        with pytest.raises(convpeft.OptionError, match=r"unknown key 'strat' .*Closest: start"):
            convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "shift", "strat": 1.0}]})

    def test_a_class_may_be_registered_again(self):
        convpeft.register_adapter("shift")(Shift)
        assert convpeft.register_adapter("shift")(Shift) is Shift  # a reloaded module, a notebook cell run twice

    @pytest.mark.parametrize("kind", ["lora", "leave"])
    def test_taken_names_are_refused(self, kind):
        with pytest.raises(convpeft.RegistrationError, match=f"kind '{kind}' is taken by"):
            convpeft.register_adapter(kind)(Shift)

    @pytest.mark.parametrize("thing", [nn.Conv2d, lambda site, options: None, 3], ids=["module", "function", "number"])
    def test_only_adapters_are_registered(self, thing):
        with pytest.raises(convpeft.RegistrationError, match=r"is not a subclass of convpeft\.adapters\.Adapter"):
            convpeft.register_adapter("thing")(thing)

    @pytest.mark.parametrize("places", [(), ("beside",)], ids=str)
    def test_places_must_be_known(self, places):
        broken = type("Broken", (Adapter,), {"places": places})
        with pytest.raises(convpeft.RegistrationError, match=r"Broken\.places must name 'parallel', 'output' or both"):
            convpeft.register_adapter("broken")(broken)
        assert "broken" not in convpeft.adapter_kinds()

    def test_an_unknown_kind_names_the_nearest(self):
        with pytest.raises(convpeft.UnknownKind, match=r"rule 1: unknown kind 'lroa'\. Closest: lora"):
            convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "lroa"}]})
