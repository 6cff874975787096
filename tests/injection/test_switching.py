"""Switching between adapters: all or nothing, and back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft import AdapterConflict, StateError, UnknownAdapter
from convpeft.hosts.unfrozen import tensors_of
from tests.cases import assert_relative, bits, same_bits
from tests.detector import LORA, A, B, Untouched, detector, images, scrambled, two


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def flags(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


class TestSwitching:
    @pytest.mark.parametrize("second", [B, {"rules": [LORA], "unfreeze": ["score"]}], ids=["apart", "overlapping"])
    def test_a_b_none_a_bit_for_bit_with_training_between(self, second):
        model, x = detector(), images()
        before, own = bits(model), model(x)
        outputs, states = {None: own}, {}
        for name, spec in (("a", A), ("b", second)):
            convpeft.inject(model, spec, name=name)
            assert torch.equal(model(x), own)
        optimizers = {}
        for name in ("a", "b"):
            convpeft.set_active(model, name)
            optimizers[name] = torch.optim.AdamW(convpeft.param_groups(model, lr=0.05))

        def look(name):
            convpeft.set_active(model, name)
            return model(x), {key: t for key, t in bits(model).items() if "convpeft" not in key}

        def step(name):
            convpeft.set_active(model, name)
            model.train()
            optimizers[name].zero_grad()
            model(images(4)).square().sum().backward()
            optimizers[name].step()
            model.eval()
            return look(name)

        for name in ("a", "b", "b", "a", "b"):
            last = outputs.get(name)
            outputs[name], states[name] = step(name)
            assert last is None or not torch.equal(outputs[name], last)
            for other in ("a", None, "b", "a", "b", None):
                output, state = look(other)
                if other is None:
                    assert all(torch.equal(state[key], before[key]) for key in before)
                    assert list(state) == list(before)
                elif other in states:
                    assert same_bits(states[other], state)
                if other in outputs and (other is None or other in states):
                    assert torch.equal(output, outputs[other])
        assert same_bits(before, bits(convpeft.eject(model)))
        assert torch.equal(model(x), own)

    def test_only_the_active_ones_train(self):
        model = two()
        expected = {
            "a": {"body.0.conv.", "body.0.norm.", "body.1.conv.convpeft.a", "score."},
            "b": {"stem.conv.convpeft.b", "box.", "stem.norm.", "body.0.norm.", "body.1.norm."},
        }
        for name, prefixes in expected.items():
            convpeft.set_active(model, name)
            names = trained(model)
            assert all(any(key.startswith(prefix) for prefix in prefixes) for key in names)
            assert all(any(key.startswith(prefix) for key in names) for prefix in prefixes)
            assert not any("_stash" in key for key in names)
            model(images()).sum().backward()
            assert {key for key, p in model.named_parameters() if p.grad is not None} == set(names)
            model.zero_grad(set_to_none=True)
        convpeft.set_active(model, None)
        assert trained(model) == []

    def test_the_sum_of_two(self):
        model, x = detector(), images()
        for name in ("a", "b"):
            convpeft.inject(model, {"rules": [LORA]}, name=name)
        scrambled(model)
        layer, z = model.body[0].conv, torch.randn(2, 8, 6, 6).double()
        own, a, b = nn.Conv2d.forward(layer, z), layer.convpeft.a(z), layer.convpeft.b(z)
        for names, expected in {
            ("a",): own + a, ("b",): own + b, ("a", "b"): own + a + b, ("b", "a"): own + b + a, (): own
        }.items():  # fmt: skip
            convpeft.set_active(model, list(names))
            assert convpeft.active_adapters(model) == names
            torch.testing.assert_close(layer(z), expected, rtol=1e-12, atol=1e-12)
            assert {key.split(".convpeft.")[1][0] for key in trained(model)} == set(names)
        both = {tuple(names): (convpeft.set_active(model, names), model(x))[1] for names in map(list, ("ab", "ba"))}
        assert_relative(both["a", "b"], both["b", "a"], 1e-13)

    def test_parallel_and_output_adapters_of_one_layer_each_see_the_layers_own(self):
        model, z = detector(), torch.randn(1, 8, 4, 4).double()
        convpeft.inject(model, {"rules": [{"match": "box", "kind": "lora"}]}, name="a")
        convpeft.inject(model, {"rules": [{"match": "box", "kind": "bottleneck"}]}, name="b")
        convpeft.set_active(scrambled(model), ["a", "b"])
        own = nn.Conv2d.forward(model.box, z)
        assert torch.equal(model.box(z), own + model.box.convpeft.a(z) + model.box.convpeft.b(own))

    def test_two_that_own_the_same_tensors_conflict(self):
        model = two()
        before = Untouched(model)
        text = r"'[ab]' and '[ab]' both bring their own weights of 'body\.0\.norm'; .*one at a time, not together"
        for call in (
            lambda: convpeft.set_active(model, ["a", "b"]),
            lambda: convpeft.using(model, ("b", "a")).__enter__(),
        ):
            with pytest.raises(AdapterConflict, match=text):
                call()
        before.check()
        assert convpeft.active_adapters(model) == ("b",)

    def test_two_that_own_different_tensors_add_up(self):
        model, x = detector(), images()
        convpeft.inject(model, {"unfreeze": ["score"]}, name="a")
        convpeft.inject(model, {"unfreeze": ["box"]}, name="b")
        scrambled(model)
        score, box = (dict(tensors_of(m, n)) for m, n in ((model.score, "a"), (model.box, "b")))
        convpeft.set_active(model, ["a", "b"])
        assert model.score.weight is score["weight"]
        assert model.box.weight is box["weight"]
        both = model(x)
        convpeft.set_active(model, "b")
        assert not torch.equal(model(x), both)
        assert model.box.weight is box["weight"]
        assert model.score.weight is not score["weight"]

    @pytest.mark.parametrize(
        ("names", "error", "text"),
        [
            ("c", UnknownAdapter, "no adapter is named 'c'; there are: a, b"),
            (["a", "bb"], UnknownAdapter, r"no adapter is named 'bb'; there are: a, b\. Did you mean 'b'\?"),
            (["a", "a"], StateError, r"an adapter is named twice in \['a', 'a'\]"),
            ([3], StateError, "names of adapters are texts, not 3"),
            (3, StateError, "names of adapters are texts, not 3"),
        ],
    )
    def test_names_that_are_none(self, names, error, text):
        model = two()
        before = Untouched(model)
        for call in (convpeft.set_active, lambda *arguments: convpeft.using(*arguments).__enter__()):
            with pytest.raises(error, match=text):
                call(model, names)
        before.check()

    def test_without_adapters(self):
        model = detector()
        for call in (
            lambda: convpeft.set_active(model, None),
            lambda: convpeft.disabled(model).__enter__(),
            lambda: convpeft.check(model, images()),
            lambda: convpeft.param_groups(model, lr=1),
            lambda: convpeft.eject(model, "a"),
        ):
            with pytest.raises(StateError, match=r"this Detector has no adapters: convpeft\.inject\(model, spec\)"):
                call()
        assert convpeft.active_adapters(model) == ()
        assert convpeft.eject(model) is model

    def test_shared_tensors_stay_shared(self):
        model, x = detector(), images()
        model.twin = nn.Linear(6, 4).double()
        model.twin.weight = model.score.weight
        before, own = Untouched(model), model(x)
        for name in ("a", "b"):
            convpeft.inject(model, {"unfreeze": ["score", "twin"]}, name=name)
            assert model.twin.weight is model.score.weight
        assert sum(p.numel() for group in convpeft.param_groups(model, lr=1) for p in group["params"]) == 24 + 4 + 4
        assert len({id(p) for group in convpeft.param_groups(model, lr=1) for p in group["params"]}) == 3
        found = convpeft.summary(model)
        assert found.base_parameters == sum(p.numel() for p in detector().parameters()) + 4
        assert found.trainable_parameters == found.rows[0][4] == 32
        scrambled(model)
        assert not torch.equal(model(x), own)
        convpeft.set_active(model, None)
        assert model.twin.weight is model.score.weight
        assert torch.equal(model(x), own)
        convpeft.eject(model)
        before.check()


class TestContexts:
    def test_nested(self):
        model, x = scrambled(two()), images()
        outputs = {name: (convpeft.set_active(model, name), model(x))[1] for name in ("a", None, "b")}
        before, training = Untouched(model), flags(model)
        with convpeft.using(model, "a") as inside:
            assert inside is model
            assert torch.equal(model(x), outputs["a"])
            with convpeft.disabled(model):
                assert torch.equal(model(x), outputs[None])
                with convpeft.using(model, "b"):
                    assert torch.equal(model(x), outputs["b"])
                assert torch.equal(model(x), outputs[None])
            assert torch.equal(model(x), outputs["a"])
        assert torch.equal(model(x), outputs["b"])
        assert flags(model) == training
        before.check()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_exception_inside(self, error):
        model = scrambled(two())
        before = Untouched(model)
        with pytest.raises(error), convpeft.using(model, "a"), convpeft.disabled(model):
            raise error
        assert convpeft.active_adapters(model) == ("b",)
        before.check()

    def test_switching_inside(self):
        model = two()
        before = Untouched(model)
        with convpeft.disabled(model):
            convpeft.set_active(model, "a")
            with convpeft.using(model, None):
                pass
            assert convpeft.active_adapters(model) == ("a",)
        assert convpeft.active_adapters(model) == ("b",)
        before.check()  # b trains again, not a

    def test_injecting_inside(self):
        model = two()
        training = trained(model)
        with convpeft.using(model, "a"):
            convpeft.inject(model, {"rules": [LORA]}, name="c")
        assert convpeft.active_adapters(model) == ("b",)
        assert trained(model) == training

    def test_ejecting_inside(self):
        model = two()
        with convpeft.using(model, "a"):
            convpeft.eject(model, "b")
        assert convpeft.active_adapters(model) == ()
        with convpeft.using(model, "a"):
            convpeft.eject(model)
        assert not [key for key in model.state_dict() if "convpeft" in key]
        model = two()
        with convpeft.using(model, "a"):
            convpeft.eject(model)
            convpeft.inject(model, {"rules": [LORA]}, name="new")
        assert convpeft.active_adapters(model) == ("new",)
