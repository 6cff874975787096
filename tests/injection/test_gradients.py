"""``check`` names the adapters that no gradient reaches, and raises no false alarm."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import convpeft
from tests.detector import LORA, Untouched, detector, images, scrambled

X = torch.randn(2, 3, 8, 8)


class Two(nn.Module):
    """A backbone and a head, run in the way that ``how`` says; the backbone's adapter is what it is about."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x, targets=None):
        return self.how(self, x, targets)


def frozen(model, x, targets):
    with torch.no_grad():
        features = model.backbone(x)
    return model.head(features)


def frozen_deep_down(model, x, targets):
    x = model.backbone[2](model.backbone[1](torch.no_grad()(model.backbone[0])(x)))
    return {"scores": [model.head(x)], "count": 3}


def switched(model, x, targets):
    with torch.set_grad_enabled(False):
        features = [model.backbone(x)]
    return model.head(features[0]), features


def reentrant(model, x, targets):
    return model.head(checkpoint(model.backbone, x, use_reentrant=True))


def reentrant_in_training(model, x, targets):
    return model.head(checkpoint(model.backbone, x, use_reentrant=True) if model.training else model.backbone(x))


def nested(model, x, targets):
    return model.head(checkpoint(lambda y: checkpoint(model.backbone, y, use_reentrant=True), x, use_reentrant=True))


def detached(model, x, targets):
    return model.head(model.backbone(x).detach())


def by_data(model, x, targets):
    return model.head(model.backbone(x).data.clone())


def frozen_and_no_training_without_targets(model, x, targets):
    if model.training and targets is None:
        raise ValueError("targets, please")
    return frozen(model, x, targets)


CUTS = {
    frozen: "torch.no_grad()",
    frozen_deep_down: "torch.no_grad()",
    switched: "torch.no_grad()",
    frozen_and_no_training_without_targets: "torch.no_grad()",
    reentrant: "reentrant checkpoint",
    reentrant_in_training: "reentrant checkpoint",
    nested: "reentrant checkpoint",
    detached: "detached",
    by_data: "detached",
}


def injected(how, *layers, kind="lora"):
    model = Two(how).eval()
    convpeft.inject(model, {"rules": [{"match": list(layers), "kind": kind, "r" if "peft" in kind else "rank": 2}]})
    return scrambled(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", CUTS, ids=lambda how: how.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_cut_off_is_named_and_truly_is(how, training):
    model = injected(how, "backbone.0", "head").train(training)
    before = Untouched(model)
    report = convpeft.check(model, X)
    before.check()
    assert not report.ok
    assert report.called == ("backbone.0: default", "head: default")
    assert report.never_called == report.read_past == ()
    assert report.no_gradient == ("backbone.0: default",)
    assert CUTS[how] in report.reasons["backbone.0: default"]
    assert "1 of 2 active adapters ran, but no gradient reaches them:\n  backbone.0: default (" in str(report)
    model.train()
    outputs = model(X, 0)
    outputs = outputs["scores"][0] if isinstance(outputs, dict) else outputs
    (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum().backward()
    assert all(p.grad is None for p in model.backbone[0].convpeft.default.parameters())
    assert all(p.grad is not None for p in model.head.convpeft.default.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", [frozen, reentrant], ids=lambda how: how.__name__)
def test_a_model_of_which_nothing_trains_is_named_too(how):
    report = convpeft.check(injected(how, "backbone.0"), X)
    assert report.no_gradient == ("backbone.0: default",)


def predicts(model, x, targets):
    """Gives boxes without a graph where it is not trained, as detectors do."""
    scores = model.head(model.backbone(x))
    if model.training and targets is None:
        raise ValueError("targets, please")
    return scores if model.training else {"boxes": scores.detach().sigmoid(), "labels": scores.argmax(1)}


def half_detached(model, x, targets):
    if model.training and targets is None:
        raise ValueError("targets, please")
    features = model.backbone(x)
    return features.detach(), model.head(features.detach()) if not model.training else model.head(features)


@dataclass
class Boxes:
    scores: torch.Tensor


class Slotted:
    __slots__ = ("scores",)

    def __init__(self, scores):
        self.scores = scores


FINE = {
    "plain": lambda model, x, targets: model.head(model.backbone(x)),
    "checkpoint": lambda model, x, targets: model.head(checkpoint(model.backbone, x, use_reentrant=False)),
    "reentrant-with-gradients": lambda model, x, targets: model.head(
        checkpoint(model.backbone, x + torch.zeros(1, requires_grad=True), use_reentrant=True)
    ),
    "an-object": lambda model, x, targets: [Boxes(model.head(model.backbone(x)))],
    "an-object-nobody-looks-into": lambda model, x, targets: (Slotted(model.head(model.backbone(x))), x),
    "predicts": predicts,
    "half-detached-where-it-is-not-trained": half_detached,
    "twice": lambda model, x, targets: model.head(model.backbone(x) + torch.no_grad()(model.backbone)(x)),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the pass without gradients
@pytest.mark.parametrize("how", FINE)
@pytest.mark.parametrize("training", [False, True])
def test_no_false_alarms(how, training):
    model = injected(FINE[how], "backbone.0", "head").train(training)
    report = convpeft.check(model, X, targets=1) if training else convpeft.check(model, X)
    assert report.ok, str(report)
    assert str(report) == "all 2 active adapters were called"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_inputs_that_require_gradients_let_them_through_a_reentrant_checkpoint():
    model = injected(reentrant, "backbone.0", "head")
    assert convpeft.check(model, X.clone().requires_grad_()).ok


def test_every_kind_is_reached():
    for kind in ("lora", "rep_mona", "bottleneck", "hierarchical", "mona", "moe_rep_mona", "conv_lora", "peft:loha"):
        assert convpeft.check(injected(FINE["plain"], "backbone.0", "head", kind=kind), X).ok


def test_adapters_that_do_not_train_are_not_asked_about():
    model = injected(frozen, "backbone.0", "head")
    with convpeft.using(model, "default"):
        assert convpeft.check(model, X).no_gradient == ("backbone.0: default",)
    convpeft.inject(model, {"rules": [{"match": "head", "kind": "lora"}]}, name="b")
    with convpeft.using(model, "default"):  # runs, and does not train
        assert convpeft.check(model, X).ok
    with torch.no_grad():
        convpeft.set_active(model, "default")
        assert not convpeft.check(model, X).ok


def test_a_trainers_own_freezing_is_not_called():
    class Freezes(Two):
        def train(self, mode=True):
            super().train(mode)
            for parameter in self.parameters():
                parameter.requires_grad_(False)
            return self

    model = Freezes(FINE["plain"])
    model.training = False
    convpeft.inject(model, {"rules": [{"match": "head", "kind": "lora"}]})
    before = Untouched(model)
    assert convpeft.check(model, X).ok
    before.check()


def test_statistics_and_random_numbers_stay():
    model = detector()
    convpeft.inject(model, {"rules": [{**LORA, "dropout": 0.5}], "norm": "adapt"})
    model.train()
    before, x = Untouched(model), images()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert convpeft.check(model, x).ok
    assert torch.equal(torch.rand(2), expected)
    before.check()
