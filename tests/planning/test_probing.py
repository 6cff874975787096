"""The channels of an output: told by the rule, by the last step of a block, or by a run."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import convpeft
from convpeft import SpecError
from tests.detector import Block, Untouched, scrambled
from tests.planning.refusals import refused

Pair = namedtuple("Pair", "low high")


class TestChannels:
    @staticmethod
    def block(output):
        """Return a model whose ``block`` gives 5 channels in the form asked for, and an image to run it on."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Block(3, 5)
                self.wrap = Wrap(self.block)

            def forward(self, x):
                return self.wrap(x)

        class Wrap(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.inner = block

            def forward(self, x):
                return output(self.inner(x))

        return Model().double().eval(), torch.randn(2, 3, 4, 4).double()

    FORMS = pytest.mark.parametrize(
        ("form", "entry"),
        [
            (lambda x: x, None),
            (lambda x: (x[:, :2], x), 1),
            (lambda x: [x, 3], -2),
            (lambda x: {"low": x, "high": None}, "low"),
            (lambda x: OrderedDict(a=1, b=x), "b"),
            (lambda x: Pair(x, x[:, :1]), 0),
            (lambda x: Pair(x[:, :1], x), "high"),
        ],
        ids=["tensor", "tuple", "list", "dict", "ordered", "namedtuple", "namedtuple field"],
    )

    @FORMS
    def test_entries_of_outputs(self, form, entry):
        model, x = self.block(form)
        before, own = Untouched(model), model(x)
        rule = {"match": "wrap", "kind": "lora", "place": "output", "rank": 2}
        rule |= {} if entry is None else {"output": entry}
        (layer,) = convpeft.plan(model, {"rules": [rule]}).layers
        assert layer.site.geometry.out_channels == 5
        before.check()
        convpeft.inject(model, {"rules": [rule]})
        adapter = model.wrap.convpeft.default
        nn.init.normal_(adapter.up)
        got = model(x)

        def at(output, key):
            return getattr(output, key) if isinstance(output, Pair) and isinstance(key, str) else output[key]

        if entry is None:
            assert torch.equal(got, own + adapter(own))
            return
        assert type(got) is type(own)
        assert torch.equal(at(got, entry), at(own, entry) + adapter(at(own, entry)))
        changed = at(got, entry)
        for old, new in zip(*((o.values() if isinstance(o, dict) else o) for o in (own, got)), strict=True):
            assert new is changed or (torch.equal(old, new) if isinstance(old, torch.Tensor) else old is new)

    def test_a_transformers_output_by_name_or_index(self):
        outputs = pytest.importorskip("transformers.modeling_outputs")
        for entry in ("last_hidden_state", 0):
            model, x = self.block(lambda x: outputs.BaseModelOutput(last_hidden_state=x))
            own = model(x).last_hidden_state
            convpeft.inject(model, {"rules": [{"match": "wrap", "kind": "lora", "place": "output", "output": entry}]})
            scrambled(model)
            got, adapter = model(x), model.wrap.convpeft.default
            assert isinstance(got, outputs.BaseModelOutput)
            assert list(got.keys()) == ["last_hidden_state"]
            assert torch.equal(got.last_hidden_state, own + adapter(own))
            assert got[0] is got.last_hidden_state

    def test_where_nothing_tells_the_channels(self):
        rule = {"match": "wrap", "kind": "lora", "place": "output"}
        tell = r"channels of its output could not be found out.*channels: in the rule, output: .*example_inputs="
        model, x = self.block(lambda x: (x, x))
        refused({"rules": [rule]}, SpecError, rf"rule 1: wrap \(Wrap\): the {tell}", model)
        refused({"rules": [rule]}, SpecError, tell, model, example_inputs=x)
        refused({"rules": [{**rule, "output": 2}]}, SpecError, tell, model)
        refused({"rules": [{**rule, "output": "low"}]}, SpecError, tell, model)
        model, x = self.block(lambda x: x)
        model.wrap.inner = Block(7, 5).double().eval()  # no 3-channel image runs here
        wide = torch.randn(1, 7, 3, 3).double()
        assert (
            convpeft.plan(model, {"rules": [rule]}).layers[0].site.geometry.out_channels == 5
        )  # the block alone tells
        assert convpeft.plan(model, {"rules": [rule]}, example_inputs=wide).layers[0].site.geometry.out_channels == 5
        assert convpeft.plan(model, {"rules": [rule]}, example_inputs=(wide,)).layers[0].site.geometry.out_channels == 5
        assert convpeft.plan(model, {"rules": [{**rule, "channels": 5}]}).layers[0].site.geometry.out_channels == 5
        refused(
            {"rules": [{**rule, "channels": 4}]},
            SpecError,
            r"rule 1: wrap \(Wrap\): the rule says channels: 4, but its output has 5",
            model,
            example_inputs=wide,
        )
        text = r"cannot plan for this Model: it failed on the example inputs: RuntimeError: .*expected input"
        refused({"rules": [rule]}, SpecError, text, model, example_inputs=x)

    @pytest.mark.parametrize(
        ("last", "channels"),
        [
            ([nn.ReLU(), nn.Dropout(0.1)], 8),
            ([nn.GLU(1)], 4),
            ([nn.GroupNorm(2, 8), nn.SiLU()], 8),
            ([nn.PixelShuffle(2)], 2),
            ([nn.Flatten(1)], 8 * 64 * 64),
        ],
        ids=["activation", "GLU", "norm", "shuffle", "flatten"],
    )
    def test_the_last_step_of_a_sequential(self, last, channels):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 1), *last)).eval()
        rule = {"match": "0", "kind": "lora", "place": "output", "rank": 1}
        (layer,) = convpeft.plan(model, {"rules": [rule]}).layers
        assert layer.site.geometry.out_channels == channels
        x = torch.randn(1, 3, 64, 64)
        own = model(x)
        convpeft.inject(model, {"rules": [rule]})
        assert torch.equal(model(x), own)
