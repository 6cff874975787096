"""Injecting and ejecting: in any order, by name, and into parts; back bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import convpeft
from convpeft import StateError, UnknownAdapter
from tests.cases import bits, same_bits
from tests.detector import LORA, A, B, Untouched, detector, images, scrambled, two
from tests.shift import Shift


class TestEjecting:
    @pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
    def test_in_any_order(self, order):
        model, x = detector(), images()
        model.box.requires_grad_(False)
        own = model(x)
        before = Untouched(model)
        for name, spec in {"a": A, "b": B, "c": {"rules": [LORA, {"match": "neck", "kind": "lora"}]}}.items():
            convpeft.inject(model, spec, name=name)
        scrambled(model)
        outputs = {name: (convpeft.set_active(model, name), model(x))[1] for name in "abc"}
        for number, name in enumerate(order):
            convpeft.eject(model, name)
            for left in order[number + 1 :]:
                convpeft.set_active(model, left)
                assert torch.equal(model(x), outputs[left])
                assert not [key for key in model.state_dict() if f".{name}." in key]
        before.check()
        assert torch.equal(model(x), own)

    def test_the_active_one(self):
        model = two()
        convpeft.eject(model, "b")
        assert convpeft.active_adapters(model) == ()
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_an_unknown_one(self):
        model = two()
        before = Untouched(model)
        with pytest.raises(UnknownAdapter, match="no adapter is named 'c'"):
            convpeft.eject(model, "c")
        before.check()

    def test_an_optimizer_of_the_base_survives(self):
        model, x = detector(), images()
        twin = detector()
        twin.load_state_dict(model.state_dict())
        optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (model, twin)]
        for number in range(4):
            if number == 2:
                convpeft.inject(model, A)
                scrambled(model)
                convpeft.eject(model)
            for each, optimizer in zip((model, twin), optimizers, strict=True):
                optimizer.zero_grad()
                each(x).square().sum().backward()
                optimizer.step()
        assert same_bits(bits(model), bits(twin))

    def test_inject_after_eject_starts_anew(self):
        model, x = detector(), images()
        own = model(x)
        convpeft.inject(model, A)
        scrambled(model)
        convpeft.eject(model)
        convpeft.inject(model, A)
        assert torch.equal(model(x), own)


class TestNames:
    @pytest.mark.parametrize("name", ["", "a.b", "a/b", "a\\b", "a b", "a\nb", "_a", "_base", "_stash", None, 3])
    def test_that_are_refused(self, name):
        model = detector()
        before = Untouched(model)
        with pytest.raises(StateError, match="is no adapter name: use a text without dots, slashes or blanks"):
            convpeft.inject(model, {"rules": [LORA]}, name=name)
        before.check()

    def test_that_are_taken(self):
        model = two()
        before = Untouched(model)
        with pytest.raises(StateError, match=r"an adapter 'a' is already in the model.*convpeft\.eject\(model, 'a'\)"):
            convpeft.inject(model, {"rules": [LORA]}, name="a")
        before.check()


class TestParts:
    """A part of a model, or a model around it."""

    def test_a_wrapper_is_looked_through(self):
        model, x = two(), images()
        wrapped = nn.Sequential(model)
        convpeft.set_active(wrapped, "a")
        assert convpeft.active_adapters(model) == ("a",)
        convpeft.inject(wrapped, {"rules": [LORA]}, name="c")
        assert convpeft.check(wrapped, x).ok
        convpeft.eject(wrapped)
        assert not [key for key in wrapped.state_dict() if "convpeft" in key]

    def test_a_part_of_an_adapted_model_is_refused(self):
        model = two()
        before = Untouched(model)
        text = "this Block is part of a model that has adapters already, or a copy of such a part"
        for spec in ({"rules": [{"match": "conv", "kind": "lora"}]}, {"unfreeze": ["conv"]}):
            with pytest.raises(StateError, match=text):
                convpeft.inject(model.body[0], spec)
        before.check()

    def test_two_adapted_parts_are_told_apart(self):
        model = nn.Sequential(detector(), detector())
        for part in model:
            convpeft.inject(part, {"rules": [LORA]})
        with pytest.raises(StateError, match="2 parts of this Sequential have adapters of their own: name one of them"):
            convpeft.set_active(model, None)
        convpeft.set_active(model[0], None)
        assert convpeft.active_adapters(model[1]) == ("default",)

    def test_a_layer_that_was_replaced_is_named(self):
        model = two()
        model.box = nn.Conv2d(8, 6, 1).double()
        for call in (lambda: convpeft.set_active(model, "a"), lambda: convpeft.eject(model)):
            with pytest.raises(StateError, match="'box' was adapted and has been replaced by a plain Conv2d"):
                call()
        del model.box
        with pytest.raises(StateError, match="'box' was adapted and is no longer in the model"):
            convpeft.set_active(model, "a")


@pytest.mark.usefixtures("clean_registry")
def test_a_kind_from_outside_switches_and_ejects_as_the_built_in_ones_do():
    convpeft.register_adapter("shift")(Shift)
    model, x = detector(), images()
    before, own = bits(model), model(x)
    convpeft.inject(model, {"rules": [{"match": "score", "kind": "shift"}], "unfreeze": ["box"]}, name="a")
    convpeft.inject(model, {"rules": [LORA]}, name="b")
    scrambled(model)
    convpeft.set_active(model, "a")
    changed = model(x)
    assert not torch.equal(changed, own)
    with convpeft.disabled(model):
        assert torch.equal(model(x), own)
    assert torch.equal(model(x), changed)
    assert same_bits(before, bits(convpeft.eject(model)))
