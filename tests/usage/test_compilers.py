"""Compilers, exporters and tracers over an adapted model follow ``set_active``, where they can."""

from __future__ import annotations

import warnings

import pytest
import torch

import convpeft
from tests.detector import LORA, detector, images, scrambled


class TestCompilers:
    """Each follows ``set_active``, where it can follow anything at all."""

    @pytest.fixture
    def model(self):
        torch._dynamo.reset()
        model = detector()
        spec = {"rules": [LORA, {"match": "neck", "kind": "lora", "place": "output", "rank": 2}]}
        convpeft.inject(model, {**spec, "unfreeze": ["score"]}, name="a")
        convpeft.inject(model, {"rules": [{"match": "**", "kind": "lora", "only": "Conv2d"}]}, name="b")
        return scrambled(model)

    def test_compile(self, model):
        x, compiled = images(), torch.compile(model, fullgraph=True, backend="eager")
        for training in (False, True):
            model.train(training)
            for names in ("a", "b", None, ["a", "b"], "a"):
                convpeft.set_active(compiled if names == "b" else model, names)
                assert torch.equal(compiled(x), model(x))
        convpeft.set_active(model, "b")
        compiled(x).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(grads) == {name for name, p in model.named_parameters() if ".convpeft.b." in name}
        model.zero_grad()
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in grads:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-12, atol=1e-12)

    def test_export(self, model):
        x = images()
        for names in ("a", ["a", "b"], None):
            convpeft.set_active(model, names)
            exported = torch.export.export(model, (x,)).module()
            torch.testing.assert_close(exported(x), model(x), rtol=1e-12, atol=1e-12)

    def test_trace(self, model):
        x, other = images(), images()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, (x,))
        torch.testing.assert_close(traced(other), model(other), rtol=1e-12, atol=1e-12)
