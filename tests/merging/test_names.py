"""A merge writes onto no name of the user's, leaves nothing where others walk, and gives everything back if it fails."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import convpeft
from convpeft.hosts import chains
from convpeft.hosts.chains import attach_chains, carries_chains, chains_of
from convpeft.hosts.slots import base_class
from tests.cases import assert_relative, bits, same_bits
from tests.hosts.fusing import Whole, image

BESIDE = {"kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 7]}
ON_OUTPUT = {"kind": "rep_mona", "rank": 2, "place": "output"}


def adapted(block: nn.Module, rule: dict) -> nn.Module:
    """Return a model with an adapter that does something on its middle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.Conv2d(4, 2, 1)).double().eval()
    convpeft.inject(model, {"rules": [{"match": "1", **rule}]})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


class Conv(nn.Conv2d):
    """A convolution; its subclasses have something of the name that a chain would take."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)


class WithChild(Conv):
    def __init__(self):
        super().__init__()
        self.beside = nn.ReLU()

    def forward(self, x):
        return super().forward(self.beside(x))


class WithProperty(Conv):
    @property
    def beside(self):
        return 2.0


class WithBuffer(Conv):
    def __init__(self):
        super().__init__()
        self.register_buffer("beside", torch.ones(1))
        self.beside_2 = "taken as well"


class WithQuestion(Conv):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if hasattr(self, "beside") else y


class WithGuard(Conv):
    """Lets no attribute of the name be set."""

    def __setattr__(self, name, value):
        if name in ("beside", "beside_2"):
            raise AttributeError(f"no {name} here")
        super().__setattr__(name, value)


BLOCKS = {
    "child": lambda: Named(nn.Conv2d(4, 4, 3, padding=1), after=nn.Conv2d(4, 4, 1)),
    "list": lambda: Named(nn.Conv2d(4, 4, 3, padding=1), after=nn.ModuleList([nn.Conv2d(4, 4, 1)])),
    "none": lambda: Named(nn.Conv2d(4, 4, 3, padding=1), after=None),
    "text": lambda: Named(nn.Conv2d(4, 4, 3, padding=1), after="relu"),
    "parameter": lambda: Named(nn.Conv2d(4, 4, 3, padding=1), after=nn.Parameter(torch.ones(1))),
}


class Named(nn.Module):
    """A block with something called ``after``, which it uses."""

    def __init__(self, conv, after):
        super().__init__()
        self.conv, self.after = conv, after

    def forward(self, x):
        x = self.conv(x)
        if isinstance(self.after, nn.ModuleList):
            return self.after[0](x)
        if isinstance(self.after, nn.Module):
            return self.after(x)
        return torch.relu(x) if isinstance(self.after, str) else x * (1.0 if self.after is None else self.after)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("make", [WithChild, WithProperty, WithBuffer, WithQuestion, WithGuard])
def test_a_chain_beside_a_layer_takes_no_name_of_its_own(make, inplace):
    block = make()
    names = ("beside", "beside_2") if make in (WithBuffer, WithGuard) else ("beside",)
    own = {name: getattr(block, name, None) for name in names}
    model = adapted(block, BESIDE)
    expected = model(image())
    if make is WithChild:  # its forward is more than the convolution of its weight: only a chain could do
        with pytest.raises(convpeft.MergeError):
            convpeft.merge(model, form="single", inplace=inplace)
    merged = convpeft.merge(model, form="factored", inplace=inplace) if make is not WithChild else model
    assert_relative(merged(image()), expected)
    for name, value in own.items():
        assert type(getattr(merged[1], name, None)) is type(value), name


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("what", BLOCKS)
def test_a_chain_on_an_output_takes_no_name_of_the_blocks(what, inplace):
    model = adapted(BLOCKS[what](), ON_OUTPUT)
    expected, after = model(image()), base_class_of(model[1].after)
    merged = convpeft.merge(model, inplace=inplace)
    assert_relative(merged(image()), expected)
    assert type(merged[1].after) is after
    (found,) = chains_of(merged[1])
    assert found.child not in ("after", "conv")
    again = copy.deepcopy(merged)
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(image()), merged(image()))


def base_class_of(value):
    return base_class(value) if isinstance(value, nn.Module) else type(value)


class Walking(nn.Module):
    """Runs its children in turn, whichever way it gets at them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()


def by_children(self, x):
    for child in self.children():
        x = child(x)
    return x


def by_dict(self, x):
    for child in self._modules.values():
        x = child(x)
    return x


def by_helper(self, x):
    for _, child in self.steps():
        x = child(x)
    return x


def by_comprehension(self, x):
    return sum([child(x) for name, child in self.named_children()])


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("forward", [by_children, by_dict, by_helper, by_comprehension])
def test_a_block_that_walks_over_its_children_takes_no_chain(forward, inplace):
    steps = {"steps": lambda self: list(self.named_children())}
    model = adapted(type("Walks", (Walking,), {"forward": forward, **steps})(), ON_OUTPUT)
    before = bits(model)
    with pytest.raises(
        convpeft.MergeError, match=r"1: its forward walks over its own children \(\w+\), and would meet"
    ):
        convpeft.merge(model, inplace=inplace)
    assert same_bits(before, bits(model))
    assert convpeft.active_adapters(model) == ("default",)


@pytest.mark.parametrize("base", [nn.ModuleList, nn.ModuleDict, nn.Sequential])
def test_a_container_with_a_forward_of_its_own_takes_no_chain(base):
    def forward(self, x):
        for child in self.values() if isinstance(self, nn.ModuleDict) else self:
            x = child(x) * 2
        return x

    cls = type("Own", (base,), {"forward": forward})
    conv = nn.Conv2d(4, 4, 3, padding=1)
    block = cls({"a": conv}) if base is nn.ModuleDict else cls(conv) if base is nn.Sequential else cls([conv])
    model = adapted(block, {**ON_OUTPUT, "channels": 4})
    before = Whole(model)
    with pytest.raises(convpeft.MergeError, match="it is a Own, and the chain would become one of its entries"):
        convpeft.merge(model, inplace=True)
    before.check()


class TestFailingHalfWay:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
    @pytest.mark.parametrize("step", ["attach_chains", "protect", "set_bias", "keep_shown"])
    def test_everything_is_given_back(self, step, error, monkeypatch):
        rules = [{"match": "1", **BESIDE}, {"match": "0", "kind": "lora", "rank": 2}]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), Conv(), nn.BatchNorm2d(4)).double().eval()
        convpeft.inject(model, {"rules": rules, "unfreeze": ["2"]})
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        flags, before = [p.requires_grad for p in model.parameters()], Whole(model)

        def fail(*args, **kwargs):
            raise error("half-way")

        with monkeypatch.context() as patch:
            patch.setattr(f"convpeft.merging.merge.{step}", fail)
            with pytest.raises(error, match="half-way"):
                convpeft.merge(model, inplace=True)
        before.check()
        assert [p.requires_grad for p in model.parameters()] == flags
        assert convpeft.active_adapters(model) == ("default",)
        expected = model(image())
        assert_relative(convpeft.merge(model, inplace=True)(image()), expected)

    def test_a_class_that_does_not_take_the_weight_is_refused_before(self):
        class Frozen(Conv):
            def __setattr__(self, name, value):
                if name == "weight" and "weight" in self._parameters:
                    raise RuntimeError("this weight is final")
                super().__setattr__(name, value)

        model = adapted(Frozen(), {"kind": "lora", "rank": 2})
        before = Whole(model)
        with pytest.raises(
            convpeft.MergeError, match="it cannot be given the merged weight: RuntimeError: this weight is"
        ):
            convpeft.merge(model, form="single", inplace=True)
        before.check()


class TestHooksOfTheUsers:
    @pytest.mark.parametrize("rule", [BESIDE, ON_OUTPUT], ids=["beside", "output"])
    def test_they_see_the_whole_output_before_and_after(self, rule):
        model = adapted(Named(nn.Conv2d(4, 4, 3, padding=1), None) if rule is ON_OUTPUT else Conv(), rule)
        model[1].register_forward_hook(lambda module, args, output: output.clamp(-0.5, 0.5))
        model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        expected = model(image())
        assert_relative(convpeft.merge(model, form="factored")(image()), expected)

    def test_inputs_by_keyword(self):
        model = adapted(Conv(), BESIDE)
        expected = model[1](input=torch.ones(1, 4, 9, 9).double())
        merged = convpeft.merge(model, form="factored")
        assert_relative(merged[1](input=torch.ones(1, 4, 9, 9).double()), expected)


class TestFormerModels:
    """Models that earlier versions merged: the hooks are bare functions, the children have the plain names."""

    @pytest.mark.parametrize("name", ["beside", "after"])
    def test_their_pickles_run_and_merge_again(self, name):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=name == "after"), nn.Conv2d(4, 2, 1)).double()
        chain = nn.Sequential(nn.Conv2d(3 if name == "beside" else 4, 4, 3, padding=1).double())
        model[0].add_module(name, nn.ModuleList([chain]))
        if name == "beside":
            model[0].register_forward_hook(chains.add_beside, with_kwargs=True, prepend=True)
        else:
            model[0]._modules["after"].entry = None
            model[0].register_forward_hook(chains.add_after, prepend=True)
        buffer = io.BytesIO(pickle.dumps(model))
        again, x = pickle.load(buffer), image()
        own = nn.functional.conv2d(x, model[0].weight, model[0].bias)
        expected = model[1](own + chain(x if name == "beside" else own))
        assert_relative(again(x), expected)
        assert carries_chains(again[0])
        convpeft.inject(again, {"rules": [{"match": "0", **BESIDE}]})
        nn.init.normal_(again[0].convpeft.default.up, std=0.3)
        expected = again(x)
        assert_relative(convpeft.merge(again, form="factored")(x), expected)

    def test_methods_that_they_refuse_by_name_still_refuse(self):
        from functools import partial

        call = pickle.loads(pickle.dumps(partial(chains._refuse, "Model", "fuse")))
        with pytest.raises(convpeft.HostError, match=r"Model\.fuse\(\) rewrites layers by their weights alone"):
            call(verbose=False)


def test_names_are_the_plain_ones_where_they_are_free():
    merged = convpeft.merge(adapted(nn.Conv2d(4, 4, 1), BESIDE), form="factored")
    assert "1.beside.0.0.weight" in merged.state_dict()
    layer = nn.Conv2d(3, 3, 1)
    attach_chains(layer, [nn.Sequential(nn.Conv2d(3, 3, 1))], beside=False, taken={"after"})
    assert [name for name, _ in layer.named_children()] == ["after_2"]
