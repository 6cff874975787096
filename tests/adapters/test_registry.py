"""Kinds from outside are checked as the built-in ones are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters import Adapter
from tests.cases import CASES, net
from tests.shift import Shift


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
