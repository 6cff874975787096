"""``check`` names every adapter that did not run, and leaves no trace of its run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convpeft
from convpeft import StateError

from .detector import LORA, Untouched, detector, images, two


class Reader(nn.Module):
    """One layer that runs, one whose weight is read past it, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.read, self.dead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, scale=1):
        return F.linear(self.runs(x), self.read.weight) * scale


class TestCheck:
    def test_names_what_never_ran(self):
        model, x = Reader(), torch.randn(2, 4)
        convpeft.inject(model, {"rules": [{"match": "*", "kind": "lora"}]}, name="a")
        convpeft.inject(model, {"rules": [{"match": "runs", "kind": "lora"}]}, name="b")
        convpeft.set_active(model, ["a", "b"])
        model.train()
        model.read.eval()
        before = Untouched(model)
        for report in (convpeft.check(model, x), convpeft.check(model, x, scale=2), convpeft.check(model, x=x)):
            assert not report.ok
            assert report.called == ("runs: a", "runs: b")
            assert report.never_called == ("read: a", "dead: a")
        text = str(report)
        assert text.startswith("2 of 4 active adapters were never called:\n  read: a\n  dead: a\n")
        assert "reads the layer's weight itself" in text
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
