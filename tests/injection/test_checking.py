"""``check`` names every adapter that did not run or was read past, and leaves no trace of its run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convpeft
from convpeft import StateError
from tests.detector import LORA, Untouched, detector, images, scrambled, two


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Read a layer past itself where no source of the model's own shows it."""
    return F.linear(x, layer.weight)


class Reader(nn.Module):
    """One layer that runs, one whose weight is read past it, one that never runs, and one that is called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.read, self.dead, self.both = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, scale=1):
        return linear(self.both, self.both(linear(self.read, self.runs(x)))) * scale


class TestCheck:
    def test_names_what_never_ran_and_what_was_read_past(self):
        model, x = Reader(), torch.randn(2, 4)
        convpeft.inject(model, {"rules": [{"match": "*", "kind": "lora"}]}, name="a")
        convpeft.inject(model, {"rules": [{"match": "runs", "kind": "lora"}]}, name="b")
        convpeft.set_active(model, ["a", "b"])
        model.train()
        model.read.eval()
        before = Untouched(model)
        for report in (convpeft.check(model, x), convpeft.check(model, x, scale=2), convpeft.check(model, x=x)):
            assert not report.ok
            assert report.called == ("runs: a", "both: a", "runs: b")
            assert report.never_called == ("read: a", "dead: a")
            assert report.read_past == ("read: a", "both: a")
        assert str(report) == (
            "2 of 5 active adapters were never called:\n"
            "  read: a (its weights were read by (root) (Reader) in aten.mm.default, not by the layer itself)\n"
            "  dead: a (it did not run on these inputs)\n"
            "1 of 5 active adapters ran, but not in all that their layers do:\n"
            "  both: a (its weights were read by (root) (Reader) in aten.mm.default, not by the layer itself)\n"
            "Where others read a layer's weight, put the adapter on their output instead (place: output).\n"
            "A layer that did not run may need other inputs, or belongs to a branch that nothing uses."
        )
        before.check()
        convpeft.set_active(model, "b")
        assert convpeft.check(model, x).ok
        assert str(convpeft.check(model, x)) == "all 1 active adapters were called"

    def test_attention_reads_past_what_it_holds(self):
        class Attends(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

            def forward(self, x):
                return self.attention(x, x, x)[0]

        model = Attends()
        rule = {"match": "attention", "kind": "lora", "output": 0, "place": "output"}
        x = torch.randn(1, 3, 4)
        convpeft.inject(model, {"rules": [rule]}, example_inputs=x)
        assert convpeft.check(model, x).ok

    def test_a_failing_forward_leaves_no_trace(self):
        model = two().train()
        before = Untouched(model)
        with pytest.raises(RuntimeError):
            convpeft.check(model, torch.randn(1, 5, 3, 3).double())
        before.check()

    def test_moves_no_statistics(self):
        model = detector()
        convpeft.inject(model, {"rules": [LORA], "norm": "adapt"})
        model.train()
        before = Untouched(model)
        convpeft.check(model, images())
        before.check()

    def test_the_bare_base_has_nothing_to_check(self):
        model = two()
        convpeft.set_active(model, None)
        with pytest.raises(StateError, match=r"no adapter is active.*convpeft\.set_active\(model, name\) first"):
            convpeft.check(model, images())


class Holder(nn.Module):
    """Runs a function that no class shows: ``layer`` and ``other`` are what it may use."""

    def __init__(self, function: Any, layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer, self.other = function, layer, copy.deepcopy(layer)

    def forward(self, x):
        return self.function(self.layer, self.other, x)


LINEAR = {
    "f-linear": lambda layer, other, x: F.linear(x, layer.weight, layer.bias),
    "transposed": lambda layer, other, x: x @ layer.weight.T,
    "data": lambda layer, other, x: F.linear(x, layer.weight.data),
    "detached": lambda layer, other, x: F.linear(x, layer.weight.detach()),
    "view": lambda layer, other, x: F.linear(x, layer.weight.view(2, 2, 4).flatten(0, 1)),
    "rows": lambda layer, other, x: F.linear(x, layer.weight[:2]),
    "einsum": lambda layer, other, x: torch.einsum("ni,oi->no", x, layer.weight),
    "stacked": lambda layer, other, x: F.linear(other(x), torch.cat([other.weight, layer.weight])),
    "scaled": lambda layer, other, x: F.linear(x, 2 * layer.weight),
    "unbound-forward": lambda layer, other, x: nn.Linear.forward(layer, x),
    "parameters": lambda layer, other, x: F.linear(x, next(layer.parameters())),
    "another-layers-input": lambda layer, other, x: other(layer.weight),
    "called-too": lambda layer, other, x: layer(x) + F.linear(x, layer.weight),
}
CONV = {
    "f-conv2d": lambda layer, other, x: F.conv2d(x, layer.weight, layer.bias),
    "inner-method": lambda layer, other, x: layer._conv_forward(x, layer.weight, layer.bias),
    "unfolded": lambda layer, other, x: layer.weight.flatten(1) @ F.unfold(x, 3),
    "sliced-groups": lambda layer, other, x: F.conv2d(x[:, :2], layer.weight[:, :2]),
    "as-linear": lambda layer, other, x: F.linear(x.mean((2, 3)), layer.weight.mean((2, 3))),
}
FINE = {
    "called": lambda layer, other, x: layer(x),
    "its-forward": lambda layer, other, x: layer.forward(x),
    "functional-call": lambda layer, other, x: torch.func.functional_call(layer, dict(layer.named_parameters()), x),
    "asked": lambda layer, other, x: (
        layer(x.to(layer.weight).type_as(layer.weight)) + torch.zeros_like(layer.weight).sum()
    ),
    "bias": lambda layer, other, x: layer(x) - layer.bias,
    "checkpoint": lambda layer, other, x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
}


def held(function: Any, layer: nn.Module) -> Holder:
    model = Holder(function, layer).eval()
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": "lora", "rank": 2}]})
    return scrambled(model)


class TestZoo:
    @pytest.mark.parametrize("name", [*LINEAR, *CONV])
    def test_every_bypass_is_found(self, name):
        layer, x = (
            (nn.Linear(4, 4), torch.randn(3, 4)) if name in LINEAR else (nn.Conv2d(4, 4, 3), torch.randn(2, 4, 6, 6))
        )
        model = held({**LINEAR, **CONV}[name], layer)
        report = convpeft.check(model, x)
        assert report.read_past == ("layer: default",)
        assert (report.never_called == ()) == (name == "called-too")
        assert not report.ok

    @pytest.mark.parametrize("name", FINE)
    def test_what_calls_the_layer_is_none(self, name):
        assert convpeft.check(held(FINE[name], nn.Linear(4, 4)), torch.randn(4, 4)).ok

    def test_a_tied_layer_that_runs_itself_reads_nothing_past(self):
        model = held(lambda layer, other, x: other(layer(x)), nn.Linear(4, 4))
        model.other.weight = model.layer.weight
        x = torch.randn(3, 4)
        assert convpeft.check(model, x).ok
        merged = convpeft.merge(model)
        torch.testing.assert_close(merged(x), model(x))

    @pytest.mark.parametrize(
        ("layer", "options"),
        [("linear1", {}), ("norm1", {"place": "output"}), ("self_attn", {"place": "output", "output": 0})],
    )
    def test_the_fast_path_of_an_encoder_layer_shows(self, monkeypatch, layer, options):
        """Hooks on modules would switch it off; ``inject`` refuses these, so here it is made not to know them."""
        monkeypatch.setattr("convpeft.planning.planner.bypassed", lambda modules: {})
        model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
        convpeft.inject(model, {"rules": [{"match": layer, "kind": "lora", **options}]}, example_inputs=x)
        report = convpeft.check(model, x)
        assert report.never_called == report.read_past == (f"{layer}: default",)
        assert "_transformer_encoder_layer_fwd" in str(report)

    @pytest.mark.skipif(
        not hasattr(torch.compiler, "set_stance"), reason="this torch cannot run compiled parts as written"
    )
    @pytest.mark.parametrize("wrap", ["part", "whole"])
    def test_compiled_parts_are_looked_into(self, wrap):
        torch._dynamo.reset()
        model, x = detector(), images()
        convpeft.inject(model, {"rules": [LORA]})
        compiled = torch.compile(model, backend="eager") if wrap == "whole" else model
        if wrap == "part":
            model.body[0].compile(backend="eager", fullgraph=True)
        compiled(x)
        assert convpeft.check(compiled, x).ok

    def test_a_model_inside_another_is_checked_by_calling_the_outer_one(self):
        inner, x = detector(), images()
        convpeft.inject(inner, {"rules": [LORA]})
        assert convpeft.check(nn.Sequential(nn.Identity(), inner), x).ok

    def test_an_exception_caught_inside_leaves_the_layers_told_apart(self):
        def attempt(layer, other, x):
            try:
                return layer(x[:, :1])
            except RuntimeError:
                return F.linear(other(x), layer.weight)

        assert convpeft.check(held(attempt, nn.Linear(4, 4)), torch.randn(3, 4)).read_past == ("layer: default",)
