"""The user's module objects stay: swap of classes, containers, names, own constructors."""

from __future__ import annotations

import copy
import inspect
import io
from collections import OrderedDict

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

import convpeft
from convpeft.hosts.modules import base_modules
from tests.cases import CASES, OwnConstructorConv, bits, net, same_bits
from tests.detector import LORA, Block, Detector, Untouched, detector, images, scrambled


def with_lora(model: nn.Module, match: str, name: str = "default", **rule) -> nn.Module:
    """Inject a random LoRA that is not the identity."""
    convpeft.inject(model, {"rules": [{"match": match, "kind": "lora", "rank": 2, **rule}]}, name=name)
    return scrambled(model)


def test_every_object_stays_and_no_output_bit_changes():
    model, x = detector(), images()
    modules, output = list(model.modules()), model(x)
    parameters = list(model.named_parameters())
    convpeft.inject(model, {"rules": [{"match": "**", "kind": "lora", "only": "Conv2d"}]})
    assert torch.equal(model(x), output)
    users = [module for _, module in base_modules(model)]
    assert all(a is b for a, b in zip(users, modules, strict=True))
    assert isinstance(model, Detector)
    assert type(model).__name__ == "Detector"
    assert isinstance(model.box, nn.Conv2d)
    assert type(model.box).__name__ == "AdaptedConv2d"
    assert type(model.box) is type(model.neck[0])
    assert type(model.box).__module__ == nn.Conv2d.__module__
    kept = [(name, p) for name, p in model.named_parameters() if ".convpeft." not in name]
    assert [name for name, _ in kept] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(kept, parameters, strict=True))


class TestHosts:
    def test_the_root(self):
        model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
        own = model(x)
        with_lora(model, "")
        assert type(model).__name__ == "AdaptedConv2d"
        torch.testing.assert_close(model(x), own + model.convpeft.default(x))
        assert type(convpeft.eject(model)) is nn.Conv2d
        assert torch.equal(model(x), own)

    def test_a_root_adapted_on_its_output(self):
        model, x = detector(), images()
        own = model(x)
        with_lora(model, "", place="output")
        assert torch.equal(model(x), own + model.convpeft.default(own))
        assert convpeft.check(model, x).ok
        assert type(convpeft.eject(model)) is Detector

    @torch.no_grad()
    def test_a_shared_layer_has_one_adapter(self):
        model, x = detector(), images()
        model.body.append(Block(8, 8).double().eval())
        model.body[2].conv = model.body[0].conv
        convpeft.inject(
            model, {"rules": [{"match": "body.2.conv", "kind": "lora", "rank": 2}], "unfreeze": ["body.2.conv"]}
        )
        scrambled(model)
        assert model.body[2].conv is model.body[0].conv
        (name,) = {key.split(".convpeft.")[0] for key, _ in model.named_parameters() if ".convpeft.default" in key}
        assert name == "body.0.conv"
        layer, calls = model.body[0].conv, []
        layer.convpeft.default.register_forward_hook(lambda *arguments: calls.append(1))
        model(x)
        assert len(calls) == 2
        assert [key for key in convpeft.eject(model).state_dict() if "convpeft" in key] == []

    def test_a_layer_called_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x):
                return self.conv(self.conv(x))

        model, x = Twice(), torch.randn(1, 3, 5, 5)
        with_lora(model, "conv")
        conv, f = nn.Conv2d.forward, model.conv.convpeft.default
        once = conv(model.conv, x) + f(x)
        torch.testing.assert_close(model(x), conv(model.conv, once) + f(once))

    def test_sequential_and_its_subclasses(self):
        class Stack(nn.Sequential):
            def __init__(self, width, *, depth):
                super().__init__(*[nn.Conv2d(width, width, 1) for _ in range(depth)])
                self.depth = depth

            def forward(self, x):
                for index in range(len(self)):
                    x = self[index](x) + sum(0 * step.weight.sum() for step in self)
                return x

        for host in (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)), Stack(3, depth=3)):
            model, x = nn.Sequential(host), torch.randn(1, 3, 4, 4)
            steps, own = list(host), model(x)
            with_lora(model, "0", place="output")
            assert torch.equal(model(x), own + host.convpeft.default(own))
            assert list(host) == steps
            assert len(host) == 3
            assert host[-1] is steps[-1]
            if type(host).__bases__[-1] is nn.Sequential:
                assert list(host[1:]) == steps[1:]
                assert list(host[:2].state_dict()) == [key for key in host.state_dict() if key[0] in "01"]
            convpeft.eject(model)
            assert list(host) == steps

    def test_module_dict_with_a_forward(self):
        class Branches(nn.ModuleDict):
            def forward(self, x):
                assert list(self) == list(self.keys()) == ["low", "train_high"]
                assert len(self) == len(self.values()) == 2
                return sum(branch(x) for _, branch in self.items()) + sum(branch(x) for branch in self.values())

        host = Branches({"low": nn.Conv2d(3, 4, 1), "train_high": nn.Conv2d(3, 4, 1)})
        model, x = nn.Sequential(host), torch.randn(1, 3, 4, 4)
        own = model(x)
        with_lora(model, "0", place="output")
        assert torch.equal(model(x), own + host.convpeft.default(own))
        assert "low" in host
        assert "convpeft" not in host
        assert type(convpeft.eject(model)[0]) is Branches

    def test_module_list_with_a_forward(self):
        class Steps(nn.ModuleList):
            def forward(self, x):
                for step in self:
                    x = step(x)
                return sum(self[index](x) for index in range(-len(self), len(self)))

        host = Steps([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        model, x = nn.Sequential(host), torch.randn(1, 3, 4, 4)
        own, steps = model(x), list(host)
        with_lora(model, "0", place="output")
        assert torch.equal(model(x), own + host.convpeft.default(own))
        assert list(host) == steps
        assert type(host[:1]) is Steps
        assert list(host[:1]) == steps[:1]
        assert type(convpeft.eject(model)[0]) is Steps

    @pytest.mark.parametrize("build", [CASES["own-constructor"].build, lambda: Conv2dSame(4, 6, 3, stride=2)])
    def test_subclasses_keep_class_and_fields(self, build):
        layer, x = build(), torch.randn(1, 4, 9, 9)
        own, base = layer(x), type(layer)
        with_lora(layer, "")
        for each in (layer, copy.deepcopy(layer)):
            assert isinstance(each, base)
            torch.testing.assert_close(each(x), own + each.convpeft.default(x))
            assert torch.equal(each(x), each(**{"x" if base is Conv2dSame else "input": x}))
        assert getattr(layer, "depth_first", True) is True
        assert type(convpeft.eject(layer)) is base

    def test_an_input_given_by_keyword_survives_a_factored_merge(self):
        layer, x = Conv2dSame(4, 6, 3), torch.randn(1, 4, 9, 9)
        convpeft.inject(layer, {"rules": [{"match": "", "kind": "rep_mona", "rank": 1, "kernel_sizes": [5]}]})
        merged = convpeft.merge(scrambled(layer), form="factored")
        assert torch.equal(merged(x=x), merged(x))

    def test_odd_names(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.convpeft = nn.Sequential(OrderedDict([("0", nn.Conv2d(3, 4, 1)), ("trained", nn.Conv2d(4, 4, 1))]))
                self.default = nn.ModuleDict({"convpeft_": nn.Conv2d(4, 4, 1), "a-b": nn.Conv2d(4, 4, 1)})
                self.forward_head = nn.Conv2d(4, 2, 1)

            def forward(self, x):
                x = self.convpeft(x)
                for head in self.default.values():
                    x = head(x)
                return self.forward_head(x)

        model, x = Odd().eval(), torch.randn(1, 3, 4, 4)
        before, own = bits(model), model(x)
        report = convpeft.inject(model, {"rules": [{"match": "**", "kind": "lora"}], "unfreeze": ["convpeft.trained"]})
        names = ["convpeft.0", "convpeft.trained", "default.convpeft_", "default.a-b", "forward_head"]
        assert [layer.name for layer in report.layers] == names
        assert torch.equal(model(x), own)
        assert convpeft.check(model, x).ok
        scrambled(model)
        assert not torch.equal(model(x), own)
        resumed = copy.deepcopy(model)
        resumed.load_state_dict(model.state_dict(), strict=True)
        convpeft.eject(model)
        model.load_state_dict(before, strict=True)
        assert same_bits(before, bits(model))
        assert torch.equal(model(x), own)

    @pytest.mark.parametrize(
        "name", ["train", "forward", "weight", "keys", "convpeft", "0", "a-b", "é", "active", "training"]
    )
    def test_adapter_names(self, name):
        model, x = detector(), images()
        own, before = model(x), bits(model)
        spec = {"rules": [LORA], "unfreeze": ["score"]}
        convpeft.inject(model, spec, name=name)
        convpeft.inject(model, spec, name="other")
        assert torch.equal(model(x), own)
        scrambled(model)
        changed = model(x)
        convpeft.set_active(model, name)
        model.train().eval()
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x))
        copied.load_state_dict(model.state_dict(), strict=True)
        assert not torch.equal(model(x), changed)
        convpeft.set_active(model, "other")
        assert torch.equal(model(x), changed)
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_a_class_that_may_not_be_extended(self):
        class Final(nn.Conv2d):
            def __init_subclass__(cls):
                raise TypeError("Final is final")

        model = nn.Sequential(nn.Conv2d(3, 3, 1), Final(3, 3, 1))
        before = Untouched(model)
        with pytest.raises(convpeft.HostError, match="Final does not allow its class to be extended: Final is final"):
            convpeft.inject(model, {"rules": [{"match": "*", "kind": "lora"}]})
        before.check()


def test_the_users_hooks_fire_once_and_see_the_sum():
    model, x = detector(), images()
    seen = {"pre": [], "after": [], "backward": [], "state": []}
    layer = model.body[0].conv
    handles = [
        layer.register_forward_pre_hook(lambda module, arguments: seen["pre"].append(module)),
        layer.register_forward_hook(lambda module, arguments, output: seen["after"].append(output)),
        layer.register_full_backward_hook(lambda module, inner, outer: seen["backward"].append(module)),
        layer._register_state_dict_hook(lambda *arguments: seen["state"].append(1)),
    ]
    with_lora(model, "body.0.conv")
    model(x).sum().backward()
    assert [len(seen[key]) for key in ("pre", "after", "backward")] == [1, 1, 1]
    assert seen["pre"][0] is layer
    model.state_dict()
    assert len(seen["state"]) == 1
    stemmed = model.stem(x)
    expected = nn.Conv2d.forward(layer, stemmed) + layer.convpeft.default(stemmed)
    torch.testing.assert_close(seen["after"][0], expected)
    convpeft.eject(model)
    assert len(layer._forward_hooks) == 1
    model(x)
    assert len(seen["after"]) == 2
    for handle in handles:
        handle.remove()
    assert len(layer._forward_hooks) == 0


def test_an_own_constructor_is_never_called():
    model = net(CASES["own-constructor"])
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": "lora"}]})
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded.layer, OwnConstructorConv)
    assert type(convpeft.eject(loaded).layer) is OwnConstructorConv


def test_a_model_can_be_asked_for_the_inputs_it_takes():
    """Trainers drop the columns of a data set that ``forward`` does not name."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def train(self, mode: bool = True) -> nn.Module:  # such a model is swapped, too
            return super().train(mode)

        def forward(self, images, labels=None):
            return self.conv(images)

    model = Named()
    convpeft.inject(model, {"rules": [{"match": "conv", "kind": "lora"}]})
    assert type(model) is not Named
    for forward in (model.forward, type(model).forward):
        assert [name for name in inspect.signature(forward).parameters if name != "self"] == ["images", "labels"]
    assert torch.equal(model(images=torch.ones(1, 3, 2, 2)), model(torch.ones(1, 3, 2, 2), None))
