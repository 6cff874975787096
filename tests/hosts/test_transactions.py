"""A method that loses an adapter or a chain is undone whole; one that does not is left alone, whatever it is called."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import assert_relative
from tests.hosts.fusing import SEEN_IN_A_METHOD, WRONG, Whole, adapted_model, block_class, image, one_conv

NAMES = ["fuse", "structural_reparam", "to_inference"]
FACTORED = {"kind": "rep_mona", "kernel_sizes": [3, 7]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fusing", SEEN_IN_A_METHOD)
def test_a_method_that_loses_an_adapter_is_refused_under_any_name(fusing, name):
    model = adapted_model([block_class(**{name: fusing})()])
    before, output = Whole(model), model(image())
    text = rf"Folding\.{name}\(\) would rewrite layers that carry adapters and lose them \(at .*conv.*convpeft\.merge\(model\)"
    with pytest.raises(convpeft.HostError, match=text):
        getattr(model[1], name)()
    before.check()
    if fusing not in WRONG:
        merged = convpeft.merge(model)
        getattr(merged[1], name)()
        assert_relative(merged(image()), output)


@pytest.mark.parametrize("fusing", SEEN_IN_A_METHOD)
def test_a_whole_model_is_undone_up_to_its_first_block(fusing):
    class Model(nn.Sequential):
        def deploy_all(self):
            for module in self.modules():
                if hasattr(module, "convert"):
                    module.convert()

    blocks = [block_class(convert=fusing)() for _ in range(3)]
    model = adapted_model([Model(*blocks)], match="1.2.conv")
    before = Whole(model)
    with pytest.raises(convpeft.HostError, match=r"Model\.deploy_all\(\) would rewrite layers"):
        model[1].deploy_all()
    before.check()


def test_a_method_that_returns_another_layer_is_refused():
    model = adapted_model([block_class(fuse=one_conv)()])
    before = Whole(model)
    with pytest.raises(convpeft.HostError, match=r"Folding\.fuse\(\) would rewrite .*\(at conv\)"):
        model[1].fuse()
    before.check()


def test_a_forgotten_branch_is_an_adapter_lost():
    def fuse(block):
        block.conv = block.bn = None  # as the heads of detectors drop the branch that only trains

    model = adapted_model([block_class(fuse=fuse)()])
    before = Whole(model)
    with pytest.raises(convpeft.HostError, match=r"Folding\.fuse\(\) would rewrite layers that carry adapters"):
        model[1].fuse()
    before.check()


def test_a_method_that_swallows_the_error_is_no_way_around_it():
    def convert(block):
        try:
            del block.conv
        except Exception:
            block._modules.pop("conv")

    model = adapted_model([block_class(convert=convert)()])
    before = Whole(model)
    with pytest.raises(convpeft.HostError, match=r"Folding\.convert\(\) would rewrite"):
        model[1].convert()
    before.check()


class TestHarmlessMethods:
    @pytest.mark.parametrize("chains", [False, True])
    @pytest.mark.parametrize("name", ["fuse", "reparameterize", "switch_to_deploy", "set_texts"])
    def test_encoding_texts(self, name, chains):
        def encode(block, texts, *, scale=2.0):
            block.texts = (texts * scale, block.skip(torch.ones(1, 4, 1, 1, dtype=torch.float64)).mean())
            return block

        rule = FACTORED if chains else {"kind": "lora"}
        model = adapted_model([block_class(**{name: encode})()], **rule)
        model = convpeft.merge(model, form="factored") if chains else model
        expected = model(image())
        assert getattr(model[1], name)(torch.ones(3), scale=3.0) is model[1]
        assert torch.equal(model[1].texts[0], torch.full((3,), 3.0))
        assert torch.equal(model(image()), expected)

    def test_reading_a_weight_and_noting_it(self):
        def switch_to_deploy(block):
            block.deployed, block.texts = False, float(block.conv.weight.norm())
            return block.conv.weight.shape

        model = adapted_model([block_class(switch_to_deploy=switch_to_deploy)()])
        assert model[1].switch_to_deploy() == (4, 4, 3, 3)
        assert model[1].texts == pytest.approx(float(model[1].conv.weight.norm()))

    def test_fusing_what_carries_nothing(self):
        def fuse(block):
            block.skip = nn.Sequential(copy.deepcopy(block.skip))

        model = adapted_model([block_class(fuse=fuse)()])
        expected = model(image())
        model[1].fuse()
        assert type(model[1].skip) is nn.Sequential
        assert torch.equal(model(image()), expected)

    def test_a_copy_that_keeps_its_adapters(self):
        model = adapted_model([block_class(deploy=lambda block: copy.deepcopy(block).eval())()])
        x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
        assert torch.equal(model[1].deploy()(x), model[1](x))

    def test_initialising(self):
        def init_weights(block):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Conv2d):
                    nn.init.ones_(child.weight)
                    setattr(block, name, child)

        model = adapted_model([block_class(init_weights=init_weights)()])
        model[1].init_weights()
        assert float(model[1].conv.weight.sum()) == 4 * 4 * 9

    def test_an_error_of_its_own_goes_on_its_way(self):
        def fuse(block):
            block.deployed = True
            raise ValueError("not in training")

        model = adapted_model([block_class(fuse=fuse)()])
        with pytest.raises(ValueError, match="not in training"):
            model[1].fuse()
        assert model[1].deployed

    def test_a_method_of_the_forward_pass_is_not_watched(self):
        def forward(block, x):
            return block.fuse(block.bn(block.conv(x)), block.skip(x))

        model = adapted_model([block_class(forward=forward, fuse=lambda block, a, b: a + b)()])
        assert "fuse" not in vars(model[1])
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image()), model(image()))

    def test_the_methods_signature_and_name_can_be_asked(self):
        import inspect

        model = adapted_model([block_class(fuse=lambda block, texts, scale=1: texts)()])
        assert list(inspect.signature(model[1].fuse).parameters) == ["texts", "scale"]
        assert model[1].fuse.__name__ == "fuse"


class TestChains:
    """After a factored merge the layers are plain, and their chains are not to be lost either."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("fusing", SEEN_IN_A_METHOD)
    def test_a_method_that_passes_a_chain_by_is_refused(self, fusing, name):
        model = convpeft.merge(adapted_model([block_class(**{name: fusing})()], **FACTORED), form="factored")
        before = Whole(model)
        for twin in (model, copy.deepcopy(model), reloaded(model)):
            with pytest.raises(
                convpeft.HostError, match=rf"Folding\.{name}\(\) rewrites layers by their weights alone"
            ):
                getattr(twin[1], name)()
            assert torch.equal(twin(image()), model(image()))
        before.check()

    def test_a_function_is_refused_when_it_sets_the_weight(self):
        model = convpeft.merge(adapted_model([block_class()()], **FACTORED), form="factored")
        before = Whole(model)
        conv = model[1].conv
        for name in ("weight", "bias"):
            value = nn.Parameter(torch.zeros_like(conv.weight) if name == "weight" else torch.zeros(4).double())
            with pytest.raises(
                convpeft.HostError, match=f"another {name} for this Conv2d, as if it was fused with a norm"
            ):
                setattr(conv, name, value)
        before.check()
        model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()}, assign=True)
        assert torch.equal(conv.weight, before.seen[2]["1.conv.weight"][1] + 1)

    def test_no_class_is_left_of_convpeft(self):
        model = convpeft.merge(adapted_model([block_class()()], **FACTORED), form="factored")
        assert not [module for module in model.modules() if type(module).__module__.startswith("convpeft")]
        assert type(model) is nn.Sequential
        assert type(model[1].conv) is nn.Conv2d


def reloaded(model):
    cls = type(model[1])
    globals()[cls.__name__] = cls
    cls.__module__, buffer = __name__, io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
