"""A function that replaces, deletes or rescales an adapted layer is refused, and what it had done before is taken back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from convpeft.hosts.guards import Guard
from tests.cases import assert_relative
from tests.hosts.fusing import SEEN_ANYWHERE, WRONG, Block, Whole, adapted_model, folded, image, one_conv


@pytest.mark.parametrize("fusing", SEEN_ANYWHERE)
def test_a_function_that_loses_an_adapter_is_refused_and_leaves_the_model_as_it_was(fusing):
    model = adapted_model([Block(), Block()])
    before, output = Whole(model), model(image())
    with pytest.raises(convpeft.HostError, match=r"convpeft\.merge\(model\) first"):
        fusing(model[1])
    before.check()
    merged = convpeft.merge(model)
    assert_relative(merged(image()), output)
    if fusing not in WRONG:
        fusing(merged[1])
        assert_relative(merged(image()), output)


@pytest.mark.parametrize("place", ["parallel", "output"])
def test_the_error_says_what_would_go_where(place):
    def replace(block):
        block.conv = one_conv(block)

    model = adapted_model([Block()], place=place)
    text = r"^replace: putting a Conv2d in the place of 'conv' of this Block would lose the adapters of 'conv'\. Call"
    with pytest.raises(convpeft.HostError, match=text):
        replace(model[1])
    with pytest.raises(
        convpeft.HostError, match=r"deleting '1' of this Sequential would lose the adapters of '1\.conv'"
    ):
        drop_last(model)
    with pytest.raises(convpeft.HostError, match=r"putting a Identity in the place of '1' of this Sequential"):
        set_last(model)


def drop_last(model):
    del model[-1]


def set_last(model):
    model[len(model) - 1] = nn.Identity()


def test_an_inactive_adapter_is_not_lost_either():
    model = adapted_model([Block()])
    convpeft.set_active(model, None)
    before = Whole(model)
    with pytest.raises(convpeft.HostError, match="giving it another bias or weight"):
        model[1].conv.weight = nn.Parameter(model[1].conv.weight * 2)
    before.check()


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 4, 2, bias=False), nn.Linear(3, 4)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layers_own_parameter_is_not_set_anew(layer, name):
    model = nn.Sequential(copy.deepcopy(layer))
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 1}]})
    value = nn.Parameter(torch.zeros(4) if name == "bias" else torch.zeros_like(layer.weight))
    for change in (lambda: setattr(model[0], name, value), lambda: model[0].register_parameter(name, value)):
        with pytest.raises(
            convpeft.HostError, match=f"this {type(layer).__name__} carries adapters, and giving it another"
        ):
            change()
    assert torch.equal(model[0].weight, layer.weight)
    convpeft.eject(model)
    setattr(model[0], name, value)
    assert getattr(model[0], name) is value


class TestWhatLosesNothing:
    def test_a_child_may_be_wrapped_copied_or_set_to_itself(self):
        def wrap(model):
            model[1].conv = nn.Sequential(model[1].conv)
            model[1].skip = nn.Conv2d(4, 4, 1).double()
            model[1] = copy.deepcopy(model[1])
            model[0] = model[0]

        model = adapted_model([Block()])
        model[1].skip = model[1].skip
        x = model[0](image())
        expected = model[1].bn(model[1].conv(x))
        wrap(model)
        assert torch.equal(model[1].bn(model[1].conv(x)), expected)
        assert model[1].conv[0].convpeft.active == ("default",)

    def test_a_layer_may_be_compiled(self):
        def compile_it(block):
            block.conv = torch.compile(block.conv, backend="eager")

        model = adapted_model([Block()])
        expected = model(image())
        compile_it(model[1])
        torch.testing.assert_close(model(image()), expected)

    def test_a_line_of_a_script_may_replace_a_layer_and_convpeft_says_that_it_is_gone(self):
        model = adapted_model([Block()])
        model[1].conv = nn.Identity()
        with pytest.raises(
            convpeft.StateError, match=r"'1\.conv' was adapted and has been replaced by a plain Identity"
        ):
            convpeft.merge(model)

    def test_numbers_may_be_written(self):
        def initialise(block):
            nn.init.ones_(block.conv.weight)
            block.conv.weight.data = block.conv.weight.data * 2
            block.ready = True

        model = adapted_model([Block()])
        initialise(model[1])
        assert_relative(convpeft.merge(model)(image()), model(image()))
        assert float(model[1].conv.weight.min()) == 2.0

    def test_what_a_function_did_before_is_kept_when_another_is_refused(self):
        def prepare(block):
            block.note, block.skip = "ready", nn.Conv2d(4, 4, 1)

        def fuse(block):
            block.rep = one_conv(block)
            del block.conv

        model = adapted_model([Block()])
        prepare(model[1])
        skip = model[1].skip
        with pytest.raises(convpeft.HostError, match="deleting 'conv' of this Block"):
            fuse(model[1])
        assert model[1].skip is skip
        assert model[1].note == "ready"
        assert not hasattr(model[1], "rep")


class TestTheClassOfAGuardedModule:
    def test_it_has_the_name_of_its_own_and_is_given_back(self):
        model = adapted_model([Block()])
        assert isinstance(model[1], (Block, Guard))
        assert type(model[1]).__name__ == "Block"
        assert list(model[1]._modules) == ["conv", "bn", "skip"]
        convpeft.eject(model)
        assert [type(module) for module in (model, model[1])] == [nn.Sequential, Block]
        assert set(vars(model[1])) == set(vars(Block()))

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_are_guarded_as_well(self, how):
        model = adapted_model([Block()])
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = copy.deepcopy(model) if how == "deepcopy" else torch.load(buffer, weights_only=False)
        before = Whole(twin)
        with pytest.raises(convpeft.HostError, match="deleting '1' of this Sequential"):
            drop_last(twin)
        before.check()
        assert type(convpeft.eject(twin)) is nn.Sequential

    def test_a_second_adapter_may_sit_on_a_guarded_block(self):
        model = adapted_model([Block()])
        convpeft.inject(model, {"rules": [{"match": "1", "kind": "bottleneck", "channels": 4}]}, name="on-block")
        convpeft.eject(model, "default")
        with pytest.raises(convpeft.HostError, match="would lose the adapters of '1'"):
            drop_last(model)
        convpeft.eject(model)
        assert type(model[1]) is Block


def test_folded_weights_are_those_of_the_pair():
    model = adapted_model([Block()])
    convpeft.eject(model)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    weight, bias = folded(model[1].conv, model[1].bn)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias, padding=1), model[1].bn(model[1].conv(x)))
