"""What an audit shows: groups and rates of what trains, and each thing that a training would not tell by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft import OptionError, StateError
from tests.detector import LORA, Untouched, detector, two

SPEC = {
    "rules": [{**LORA, "lr_mult": 2.0}, {"match": "neck", "kind": "bottleneck"}],
    "unfreeze": [{"match": "score", "lr_mult": 0.5}],
}


@pytest.fixture
def model() -> nn.Module:
    made = detector()
    convpeft.inject(made, SPEC, name="screw")
    return made


def sgd(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(convpeft.param_groups(model, lr=0.1, **options))


def problem(model: nn.Module, optimizer=None) -> str:
    """Return the only problem that an audit finds."""
    untouched = Untouched(model)
    report = convpeft.audit(model, optimizer)
    untouched.check()
    assert not report.ok
    assert str(report).endswith(f"wrong: {report.problems[0]}")
    (text,) = report.problems
    return text


def test_a_sound_training_is_shown_whole(model):
    report = convpeft.audit(model, sgd(model, weight_decay=0.05))
    assert report.ok, report
    report.require_ok()
    rows = {(row.part, row.group): row for row in report.rows}
    lora = rows["screw.lora", "screw.lora x2"]
    assert (lora.tensors, lora.lr_mult, lora.lr, lora.weight_decay) == (4, 2.0, 0.2, 0.05)
    bias = rows["screw.unfrozen", "screw.unfrozen x0.5 (no decay)"]
    assert (bias.tensors, bias.parameters, bias.lr, bias.weight_decay) == (1, 4, 0.05, 0.0)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row.parameters for row in report.rows) == trains
    assert report.frozen_parameters == sum(p.numel() for n, p in detector().named_parameters() if "score" not in n)
    assert (report.held_norms, report.norms, report.active) == (3, 3, ("screw",))
    assert "norms held: 3 of 3\nnothing is wrong" in str(report)


def test_without_an_optimizer_the_groups_are_those_that_would_be_made(model):
    report = convpeft.audit(model)
    assert report.ok
    assert {(row.group, row.lr) for row in report.rows} == {
        (group["name"], None) for group in convpeft.param_groups(model, lr=1.0)
    }


def test_an_optimizer_from_before_is_told(model):
    optimizer = torch.optim.SGD(detector().parameters(), lr=0.1)
    count = sum(p.requires_grad for p in model.parameters())
    text = problem(model, optimizer)
    assert text.startswith(f"the optimizer holds 0 of the {count} tensors that are to train; it lacks ")
    assert "convpeft.param_groups" in text
    with pytest.raises(StateError, match="the optimizer holds 0 of the"):
        convpeft.audit(model, optimizer).require_ok()
    assert {row.group for row in convpeft.audit(model, optimizer).rows} == {"none"}


def test_an_optimizer_of_another_adapter_is_told():
    model = two()
    optimizer = sgd(model)
    assert convpeft.audit(model, optimizer).ok
    convpeft.set_active(model, "a")
    report = convpeft.audit(model, optimizer)
    assert [text.partition(" of ")[0] for text in report.problems] == [
        "the optimizer holds 0",
        f"the optimizer holds {len(optimizer.param_groups[0]['params']) + sum(len(g['params']) for g in optimizer.param_groups[1:])} tensors",
    ]
    both = torch.optim.SGD([*(g for g in optimizer.param_groups), *convpeft.param_groups(model, lr=0.1)], lr=0.1)
    assert convpeft.audit(model, both).ok  # one for both is sound: what is not active gets no gradient


def test_several_optimizers_are_taken_together(model):
    first, *rest = convpeft.param_groups(model, lr=0.1)
    several = [torch.optim.SGD([first]), torch.optim.Adam(rest)]
    assert not convpeft.audit(model, several[0]).ok
    assert convpeft.audit(model, several).ok


def test_what_is_no_optimizer_is_refused(model):
    with pytest.raises(OptionError, match="a Linear has no param_groups"):
        convpeft.audit(model, nn.Linear(1, 1))


def test_rates_without_lr_mult_are_told(model):
    flat = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    text = problem(model, flat)
    assert text.startswith(
        "the rates are not in the ratio of lr_mult: screw.lora with lr_mult 2 has rate 0.1, and screw.unfrozen"
    )
    optimizer = sgd(model)
    for group in optimizer.param_groups:
        group["lr"] *= 1 / 3
    assert convpeft.audit(model, optimizer).ok


def test_thawed_base_parameters_are_told(model):
    model.stem.requires_grad_(True)
    text = problem(model, sgd(model))
    assert text.startswith("3 parameters of the base require gradients again (stem.conv.weight, ")
    rows = {row.part: row for row in convpeft.audit(model).rows}
    assert rows["base (thawed)"].tensors == 3
    assert rows["base (thawed)"].group == "none"


def test_frozen_adapters_and_loose_norms_are_told(model):
    model.body[1].conv.requires_grad_(False)
    for parameter in model.body[1].conv.convpeft.parameters():
        parameter.requires_grad = False
    assert problem(model).startswith("1 layers of active adapters are frozen by somebody else (body.1.conv: screw)")
    convpeft.set_active(model, "screw")
    model.stem.norm.training = True
    assert problem(model).startswith("1 of 3 norms are in training mode though convpeft holds them")
    model.train()
    assert convpeft.audit(model).ok


def test_a_model_that_somebody_froze_whole_is_told(model):
    model.requires_grad_(False)
    assert problem(model).startswith("4 layers of active adapters are frozen by somebody else")
    assert convpeft.audit(model).rows == ()


def test_no_active_adapter_and_a_lost_layer_are_told(model):
    convpeft.set_active(model, None)
    assert problem(model).startswith("no adapter is active")
    convpeft.set_active(model, "screw")
    model.body[0]._modules["conv"] = nn.Conv2d(8, 8, 3)
    assert "body.0.conv' was adapted and has been replaced by a plain Conv2d" in convpeft.audit(model).problems[0]


def test_a_model_that_a_trainer_built_anew_is_told():
    model = detector()
    text = problem(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert text.startswith(
        "this Detector has no adapters, and its own parameters train. If you injected some, the trainer"
    )
