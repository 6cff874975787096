"""Modules dealt out to rules: what a rule may land on without harm."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import convpeft


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated; modules made by it are still about
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))


@pytest.mark.parametrize("place", ["", ".0"], ids=["block", "layer"])
def test_torchscript_modules_are_refused_by_name(place):
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 3, 1)
    model.script = scripted()
    with pytest.raises(
        convpeft.SpecError, match=rf"script{place} \(RecursiveScriptModule\) cannot host an adapter: a Torch"
    ):
        convpeft.plan(model, {"rules": [{"match": f"script{place}", "kind": "bottleneck"}]})
    with pytest.raises(convpeft.SpecError, match=r"\(RecursiveScriptModule\)"):
        convpeft.plan(model, {"rules": [{"match": f"script{place}", "kind": "lora"}]})
    assert len(convpeft.plan(model, {"rules": [{"match": "**", "kind": "lora"}]}).layers) == 1


def test_a_model_with_a_torchscript_part_takes_adapters_elsewhere_and_refuses_to_merge_into_it():
    model = nn.Sequential()
    model.stem = nn.Conv2d(3, 3, 1)
    model.block = nn.Sequential(nn.Conv2d(3, 3, 1), scripted()).eval()
    x = torch.randn(1, 3, 8, 8)
    bare = model(x)
    rules = [{"match": "stem", "kind": "lora"}, {"match": "block", "kind": "lora", "channels": 4}]
    convpeft.inject(model, {"rules": rules})
    assert torch.equal(model(x), bare)
    with pytest.raises(
        convpeft.MergeError, match="block: it is a Sequential whose last step cannot take the chain"
    ) as error:
        convpeft.merge(model, inplace=True)
    assert list(error.value.reasons) == ["block"]
    assert convpeft.active_adapters(model) == ("default",)
