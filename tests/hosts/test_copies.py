"""Copies and pickles of adapted models: every adapter goes along, and nothing is shared."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import convpeft
from tests.cases import bits, same_bits
from tests.detector import LORA, detector, images, scrambled


class TestCopies:
    @staticmethod
    def full() -> nn.Module:
        """Return a detector with two adapters of everything, ``a`` active."""
        model = detector()
        spec = {"rules": [LORA, {"match": "neck", "kind": "bottleneck", "reduction": 2}], "norm": "adapt"}
        convpeft.inject(model, {**spec, "unfreeze": ["score"]}, name="b")
        convpeft.inject(model, {**spec, "unfreeze": ["box"]}, name="a")
        return scrambled(model)

    def assert_independent(self, model, copied):
        x = images()
        expected = {name: model_output(model, name, x) for name in ("a", "b", None)}
        for name, output in expected.items():
            assert torch.equal(model_output(copied, name, x), output)
        assert [type(m).__name__ for m in copied.modules()] == [type(m).__name__ for m in model.modules()]
        assert not {id(t) for t in tensors(model)} & {id(t) for t in tensors(copied)}
        before = bits(model)
        convpeft.set_active(copied, "b")
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1)
        convpeft.eject(copied)
        assert type(copied.neck) is nn.Sequential
        assert same_bits(before, bits(model))
        assert torch.equal(model_output(model, "b", x), expected["b"])

    def test_deepcopy(self):
        model = self.full()
        self.assert_independent(model, copy.deepcopy(model))

    def test_whole_module_save(self):
        model, buffer = self.full(), io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        self.assert_independent(model, torch.load(buffer, weights_only=False))

    def test_whole_module_save_into_another_process(self, tmp_path):
        model, x = self.full(), images()
        torch.save({"model": model, "x": x}, tmp_path / "model.pt")
        script = """if True:
            import sys, torch
            loaded = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
            model, x, outputs = loaded["model"], loaded["x"], {}
            import convpeft
            for name in ("a", "b", None):
                convpeft.set_active(model, name)
                outputs[name] = model(x).detach()
            model.train()
            assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
            convpeft.eject(model)
            torch.save((outputs, model.state_dict()), sys.argv[1] + "/outputs.pt")
        """
        root = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=root)
        outputs, plain = torch.load(tmp_path / "outputs.pt")
        for name in ("a", "b", None):
            assert torch.equal(outputs[name], model_output(model, name, x))
        assert same_bits(bits(convpeft.eject(model)), plain)


def model_output(model, name, x):
    convpeft.set_active(model, name)
    return model(x)


def tensors(model):
    return [*model.parameters(), *model.buffers()]
