"""Each step of the contract can fail: it is given a library that breaks just what the step looks at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import convpeft
from benchmarks.detectors import steps
from benchmarks.detectors.steps import STEPS, Bench, Convpeft
from benchmarks.detectors.zoo import Subject

FAMILY = "timm-mobilenetv4"


def nudge(model: nn.Module, key: str, amount: float) -> nn.Module:
    """Add a little to one value of a tensor, in place."""
    with torch.no_grad():
        model.state_dict(keep_vars=True)[key].view(-1)[0] += amount
    return model


class HalfAttached(Convpeft):
    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        convpeft.inject(model, {"rules": [{"match": "blocks.**", "kind": "lora", "rank": 2}]})
        return model


class NotTheIdentity(Convpeft):
    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        return nudge(super().attach(model, subject), "conv_stem.convpeft.default.up", 1e-3)


class Deaf(Convpeft):
    """One adapter is there, but its layer never calls it."""

    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        super().attach(model, subject).get_submodule("conv_head.convpeft").active = ()
        return model


class Unfreezing(Convpeft):
    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        super().attach(model, subject).get_submodule("conv_stem").weight.requires_grad_(True)
        return model


class LooseNorms(Convpeft):
    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        for module in super().attach(model, subject).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.convpeft.held = False
        return model


class Forgetful(Convpeft):
    def load(self, model: nn.Module, path: Path) -> nn.Module:
        return nudge(super().load(model, path), "conv_stem.convpeft.default.down", 1e-6)


class Imprecise(Convpeft):
    def merge(self, model: nn.Module) -> nn.Module:
        return nudge(super().merge(model), "conv_stem.weight", 1e-9)


class NotMerging(Convpeft):
    def merge(self, model: nn.Module) -> nn.Module:
        return model


class Losing(Convpeft):
    """Adapters that are merged away without a trace of what they did."""

    def merge(self, model: nn.Module) -> nn.Module:
        return super().eject(model)


class Staining(Convpeft):
    def eject(self, model: nn.Module) -> nn.Module:
        return nudge(super().eject(model), "conv_stem.weight", 1e-6)


class Remaining(Convpeft):
    def eject(self, model: nn.Module) -> nn.Module:
        return model


class Reordering(Convpeft):
    def eject(self, model: nn.Module) -> nn.Module:
        parts = super().eject(model)._modules
        parts["conv_stem"] = parts.pop("conv_stem")
        return model


CASES = [
    ("every layer", HalfAttached, "layers have no adapter"),
    ("identity at start", NotTheIdentity, "output 0 differs"),
    ("training step", Deaf, "got no gradient"),
    ("only adapters train", Unfreezing, "conv_stem.weight is trained"),
    ("BatchNorm held", LooseNorms, "running statistics changed"),
    ("save and load", Forgetful, "output 0 differs"),
    ("merge", Imprecise, "largest difference"),
    ("merge", NotMerging, "is a MobileNetV3"),
    ("merge", Losing, "largest difference"),
    ("eject", Staining, "other values"),
    ("eject", Remaining, "other keys"),
    ("eject", Reordering, "other keys, or another order"),
]


@pytest.mark.parametrize(("step", "library", "message"), CASES, ids=[f"{s}-{c.__name__}" for s, c, _ in CASES])
def test_a_step_fails_on_a_library_that_breaks_it(
    step: str, library: type[Convpeft], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        STEPS[step](Bench(FAMILY, library(), tmp_path))


def test_every_step_has_such_a_library() -> None:
    assert {step for step, _, _ in CASES} == set(STEPS)


@pytest.mark.parametrize(
    ("still", "message"), [("conv_stem", r"moved against what the zoo says: \['conv_stem'\]"), ("stem.**", r"set\(\)")]
)
def test_a_layer_that_the_zoo_wrongly_calls_still_is_seen(
    still: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = replace(steps.built(FAMILY), still=(still,))
    monkeypatch.setattr(steps, "built", lambda name: subject)
    with pytest.raises(AssertionError, match=message):
        STEPS["training step"](Bench(FAMILY, Convpeft(), tmp_path))
