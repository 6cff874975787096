"""Wrappers around a model or a part of it, parts of models, and models that share a part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convpeft
from convpeft import StateError
from convpeft.hosts.modules import base_modules
from tests.cases import bits, same_bits
from tests.detector import LORA, Untouched, detector, images, scrambled

NAMES = ["body.0.conv", "body.1.conv"]
SPEC = {"rules": [LORA]}


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def with_part(wrap, part="body.0"):
    """Return a detector one part of which is wrapped."""
    model = detector()
    above, _, name = part.rpartition(".")
    setattr(model.get_submodule(above), name, wrap(model.get_submodule(part)))
    return model


WRAPS = pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["DataParallel", "compiled"])


class TestWrapped:
    @WRAPS
    @pytest.mark.parametrize("part", ["", "body.0", "neck"])
    def test_names_are_those_of_the_bare_model(self, wrap, part, tmp_path):
        torch._dynamo.reset()
        model = wrap(detector()) if not part else with_part(wrap, part)
        assert [name for name, _ in base_modules(model)] == [name for name, _ in base_modules(detector())]
        before, x = bits(model), images()
        own, flags = model(x), [p.requires_grad for p in model.parameters()]
        assert [layer.name for layer in convpeft.plan(model, SPEC).layers] == NAMES
        report = convpeft.inject(model, SPEC)
        assert [layer.name for layer in report.layers] == NAMES
        assert torch.equal(model(x), own)
        scrambled(convpeft.AdaptedModel.of(model).root)
        changed = model(x)
        assert not torch.equal(changed, own)
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        plain = detector()
        plain.load_state_dict({_bare(key): value for key, value in before.items()})
        convpeft.load_adapter(plain, path)
        assert torch.equal(plain(x), changed)
        torch.testing.assert_close(convpeft.merge(model)(x), changed)
        assert convpeft.check(model, x).ok
        convpeft.set_active(model, None)
        assert torch.equal(model(x), own)
        convpeft.eject(model)
        assert same_bits(bits(model), before)
        assert [p.requires_grad for p in model.parameters()] == flags

    @WRAPS
    def test_patterns_of_the_wrappers_names_fit_the_bare_model_too(self, wrap):
        inner = "module" if wrap is nn.DataParallel else "_orig_mod"
        rules = [
            {"match": [f"{inner}.body.**", f"!{inner}.body.1.conv"], "kind": "lora", "rank": 2, "only": "Conv2d"},
        ]
        for model in (detector(), wrap(detector())):
            report = convpeft.plan(model, {"rules": rules, "unfreeze": [f"{inner}.score"]})
            assert [layer.name for layer in report.layers] == ["body.0.conv"]
            assert report.owned == {"score": 1.0}

    def test_a_module_that_is_called_so_keeps_its_name(self):
        model = nn.ModuleDict({"module": nn.Sequential(nn.Conv2d(3, 4, 1)), "other": nn.Conv2d(3, 4, 1)})
        rule = {"match": "module.**", "kind": "lora", "rank": 1}
        assert [layer.name for layer in convpeft.plan(model, {"rules": [rule]}).layers] == ["module.0"]

    def test_a_part_that_is_wrapped_later_keeps_its_adapters(self):
        model, x = detector(), images()
        flags = [p.requires_grad for p in model.parameters()]
        convpeft.inject(model, SPEC)
        scrambled(model)
        expected = model(x)
        model.body[1] = nn.DataParallel(model.body[1])
        assert torch.equal(model(x), expected)
        with convpeft.disabled(model):
            assert not torch.equal(model(x), expected)
        convpeft.eject(model)
        assert [p.requires_grad for p in model.parameters()] == flags

    def test_code_that_was_compiled_before_runs_the_adapters(self):
        torch._dynamo.reset()
        model, x = detector(), images()
        fast = compiled(model)
        own = fast(x)
        convpeft.inject(fast, SPEC)
        scrambled(model)
        assert not torch.equal(fast(x), own)
        torch.testing.assert_close(fast(x), model(x))


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


class Shared(nn.Module):
    """A second detector on the backbone of a first one."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Conv2d(8, 2, 1).double()

    def forward(self, x):
        for block in self.body:
            x = block(x)
        return self.head(x)


class TestPartThenWhole:
    @pytest.mark.parametrize("verb", ["plan", "inject", "load"])
    def test_what_is_outside_of_the_part_is_not_left_out_in_silence(self, verb, tmp_path):
        model = detector()
        convpeft.inject(model, SPEC)
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        model = detector()
        convpeft.inject(model.body, {"rules": [{"match": "*.conv", "kind": "lora"}]}, name="a")
        before = Untouched(model)
        text = (
            r"the part '(0\.)?body' of this .* has adapters of its own.*convpeft\.eject\(model\.(0\.)?body\).*unchanged"
        )
        call = {"load": lambda outer: convpeft.load_adapter(outer, path, name="b")}.get(
            verb, lambda outer: getattr(convpeft, verb)(outer, SPEC)
        )
        for outer in (model, nn.DataParallel(model), nn.ModuleList([model])):
            with pytest.raises(StateError, match=text):
                call(outer)
        before.check()
        assert [
            layer.name for layer in convpeft.plan(model.body, {"rules": [{"match": "1.conv", "kind": "lora"}]}).layers
        ]

    def test_other_verbs_on_the_whole_go_to_the_part(self):
        model, x = detector(), images()
        before, own = bits(model), model(x)
        convpeft.inject(model.body, {"rules": [{"match": "*.conv", "kind": "lora"}]}, name="a")
        scrambled(model.body)
        changed = model(x)
        torch.testing.assert_close(convpeft.merge(model)(x), changed)
        with convpeft.disabled(model):
            assert torch.equal(model(x), own)
        assert convpeft.active_adapters(model) == ("a",)
        convpeft.eject(model)
        assert same_bits(bits(model), before)


VERBS = {
    "eject": convpeft.eject,
    "merge": convpeft.merge,
    "merge-copy": lambda part: convpeft.merge(copy.deepcopy(part)),
    "merge-inplace": lambda part: convpeft.merge(part, inplace=True),
    "plan_merge": convpeft.plan_merge,
    "set_active": lambda part: convpeft.set_active(part, None),
    "active": convpeft.active_adapters,
    "groups": lambda part: convpeft.param_groups(part, lr=1.0),
    "loss": convpeft.auxiliary_loss,
    "summary": convpeft.summary,
    "inject": lambda part: convpeft.inject(part, {"rules": [{"match": "**", "kind": "lora", "only": "Conv2d"}]}),
    "save": lambda part: convpeft.save_adapter(part, "never.safetensors"),
    "check": lambda part: convpeft.check(part, images()),
}


class TestWholeThenPart:
    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("part", ["body", "body.0", "body.0.conv", "shared"])
    def test_a_part_is_refused_in_words(self, verb, part):
        model = detector()
        convpeft.inject(model, SPEC)
        before = Untouched(model)
        given = Shared(model.body) if part == "shared" else model.get_submodule(part)
        with pytest.raises(
            StateError, match=r"is part of a model that has adapters already, .*or shares modules with one"
        ):
            VERBS[verb](given)
        before.check()

    def test_a_part_without_anything_of_convpefts_is_a_model_like_any_other(self):
        model = detector()
        convpeft.inject(model, SPEC, lean=False)
        part = model.score
        assert convpeft.active_adapters(part) == ()
        assert convpeft.eject(part) is part
        with pytest.raises(StateError, match="this Linear has no adapters"):
            convpeft.merge(part)
