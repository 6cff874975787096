"""Steps that would train nothing of the active adapters are refused, steps that change the frozen base are warned of."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

import convpeft
from convpeft import StateError
from tests.cases import bits, same_bits
from tests.detector import LORA, A, B, detector, images, two

NOTHING = r"would train nothing: it holds \d+ parameters of this \w+, and not one of the \d+ that are to train"


def backward(model: nn.Module) -> None:
    model(images()).square().sum().backward()


def test_an_optimizer_from_before_inject_is_refused_and_names_the_remedy():
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convpeft.inject(model, A, name="screw")
    backward(model)
    before = bits(model)
    with pytest.raises(
        StateError, match=rf"step of SGD {NOTHING} \(active adapters: 'screw'\).*convpeft\.param_groups"
    ):
        optimizer.step()
    assert same_bits(before, bits(model))
    with pytest.raises(StateError, match=NOTHING):  # every time, not the first time only
        optimizer.step()


def test_an_optimizer_of_the_adapter_before_is_refused_until_it_is_active_again():
    model = two()
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
    convpeft.set_active(model, "a")
    backward(model)
    with pytest.raises(StateError, match=rf"{NOTHING} \(active adapters: 'a'\)"):
        optimizer.step()
    convpeft.set_active(model, None)
    with pytest.raises(StateError, match=r"active adapters: none"):
        optimizer.step()
    convpeft.set_active(model, "b")
    backward(model)
    optimizer.step()


def test_groups_that_are_added_later_count():
    model = detector()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    convpeft.inject(model, A)
    with pytest.raises(StateError, match=NOTHING):
        optimizer.step()
    for group in convpeft.param_groups(model, lr=0.1):
        optimizer.add_param_group(group)
    backward(model)
    optimizer.step()


def test_loops_with_an_optimizer_for_each_adapter_step_all_of_them():
    model = two()
    second = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
    convpeft.set_active(model, "a")
    first = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
    backward(model)
    second.step()
    first.step()
    del first
    gc.collect()
    convpeft.set_active(model, "a")
    with pytest.raises(StateError, match=NOTHING):
        second.step()


def test_other_models_and_what_is_outside_of_this_one_are_nobodys_business():
    model, other, head = detector(), detector(), nn.Linear(4, 2).double()
    convpeft.inject(model, A)
    head(other(images())).sum().backward()
    torch.optim.SGD([*other.parameters(), *head.parameters()], lr=0.1).step()
    convpeft.set_active(model, None)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    head(model(images())).sum().backward()
    optimizer.step()  # trains the head on the bare base
    del optimizer
    gc.collect()
    convpeft.set_active(model, "default")
    with pytest.raises(StateError, match=NOTHING):
        torch.optim.SGD([*head.parameters(), *model.stem.parameters()], lr=0.1).step()


def test_thawed_base_parameters_that_a_step_changes_are_warned_of_once():
    model = detector()
    convpeft.inject(model, {"rules": [LORA], "unfreeze": ["score"]})
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    backward(model)
    with pytest.warns(
        UserWarning, match=r"SGD changes \d+ parameters of the base .*\(body\.0\.conv\.weight, .*unfreeze"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_an_ordinary_training_hears_nothing():
    for spec in (A, B):
        model = detector()
        convpeft.inject(model, spec)
        optimizer = torch.optim.AdamW(convpeft.param_groups(model, lr=0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                backward(model)
                optimizer.step()


def test_a_model_that_is_gone_or_ejected_is_not_looked_at():
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convpeft.inject(model, A)
    convpeft.eject(model)
    backward(model)
    optimizer.step()
