"""Where an adapter can go: hosts that would never run it are refused by name."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import convpeft
from convpeft import SpecError
from tests.cases import bits, same_bits
from tests.planning.refusals import refused


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


def test_hosts_that_would_never_run_their_adapter():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.conv = nn.Conv2d(8, 8, 1)
            self.scripted = torch.jit.script(nn.Conv2d(8, 8, 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Attention()
    model.conv.forward = lambda x: x
    for match, place, text in [
        ("mha.out_proj", "parallel", r"mha\.out_proj \(NonDyn.*cannot host an adapter: its parent MultiheadAttention reads out_proj"),
        ("layer.linear1", "parallel", "its parent TransformerEncoderLayer reads linear1.weight itself"),
        ("layer.self_attn.out_proj", "output", "its parent MultiheadAttention reads out_proj.weight itself"),
        ("conv", "parallel", r"conv \(Conv2d\) cannot host an adapter: its forward was replaced on the object"),
        ("conv", "output", "its forward was replaced on the object itself"),
        ("scripted", "output", "a TorchScript module has no Python forward to extend"),
    ]:  # fmt: skip
        spec = {"rules": [{"match": match, "kind": "lora", "place": place, "channels": 8}]}
        with pytest.raises(SpecError, match=text):
            convpeft.plan(model, spec)
        with pytest.raises(SpecError, match=text):
            convpeft.inject(model, spec)
    assert type(model.conv) is nn.Conv2d


def test_a_scripted_part_elsewhere_is_in_nobodys_way():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    before, x = bits(model), torch.randn(1, 3, 4, 4)
    output = model(x)
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]})
    assert torch.equal(model(x), output)
    assert same_bits(before, bits(convpeft.eject(model)))


def test_a_module_with_a_child_of_our_name():
    model = nn.Sequential(OrderedDict(convpeft=nn.Conv2d(3, 4, 1), act=nn.ReLU()))
    spec = {"rules": [{"match": "", "kind": "lora", "place": "output", "channels": 4}]}
    text = r"\(root\) \(Sequential\) cannot host an adapter: it has a child 'convpeft' of its own"
    refused(spec, SpecError, text, model)
