"""Adapters in another dtype than their layers: every kind computes in its own, and outputs stay in the model's."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import convpeft
from convpeft import Rule, Spec

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "lora-alpha": {"kind": "lora", "rank": 2, "alpha": 3},
    "lora-pointwise": {"kind": "lora", "rank": 2, "pointwise": True},
    "lora-output": {"kind": "lora", "rank": 2, "place": "output"},
    "dora": {"kind": "lora", "rank": 2, "dora": True},
    "rep_mona": {"kind": "rep_mona", "rank": 4},
    "rep_mona-norm": {"kind": "rep_mona", "rank": 4, "branch_norm": True},
    "rep_mona-output": {"kind": "rep_mona", "rank": 4, "place": "output"},
    "bottleneck": {"kind": "bottleneck"},
    "bottleneck-group": {"kind": "bottleneck", "norm": "group"},
    "mona": {"kind": "mona", "rank": 4},
    "hierarchical": {"kind": "hierarchical"},
    "hierarchical-window": {"kind": "hierarchical", "attention": "window", "cells": 3},
    "conv_lora": {"kind": "conv_lora", "rank": 2, "top_k": 2},
    "moe_rep_mona": {"kind": "moe_rep_mona", "rank": 4, "spatial_attention": True},
    "peft:hra": {"kind": "peft:hra", "r": 2},
    "peft:loha": {"kind": "peft:loha", "r": 2},
    "peft:ia3": {"kind": "peft:ia3"},
}
HALVES = (torch.bfloat16, torch.float16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 16, 3, padding=1), nn.SiLU())


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    return model


def adapted(rule: dict[str, Any], half: torch.dtype, dtype: Any = "float32") -> nn.Module:
    model = net().to(half).train()
    convpeft.inject(model, {"rules": [{"match": "2", **rule}]}, dtype=dtype)
    return model


def images(half: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(2)).to(half)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("rule", KINDS.values(), ids=KINDS)
def test_float32_adapters_on_a_half_base_compute_what_float64_does(rule, half, autocast):
    model = trained(adapted(rule, half))
    exact = copy.deepcopy(model).double()
    own = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in own} == {torch.float32}
    with torch.autocast("cpu", half, enabled=autocast):
        output = model(images(half))
    assert output.dtype == half
    wanted = exact(images(half).double())
    assert float((output.double() - wanted).detach().abs().max()) < 12 * torch.finfo(half).eps * float(
        wanted.detach().abs().max()
    )
    output.double().square().sum().backward()
    wanted.square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in exact.parameters() if p.requires_grad)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            apart = float((p.grad.double() - q.grad).abs().max())
            assert apart < 24 * torch.finfo(half).eps * max(float(q.grad.abs().max()), 0.02 * largest), name


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("rule", KINDS.values(), ids=KINDS)
def test_a_fresh_one_changes_no_bit(rule, half):
    model = adapted(rule, half)
    with torch.no_grad():
        expected = net().to(half)(images(half))
        assert torch.equal(model(images(half)), expected)
        with torch.autocast("cpu", half):
            assert torch.equal(model(images(half)), net().to(half)(images(half)))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (2, 5, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (1, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    ],
    ids=["linear", "transposed", "reflect", "no-batch"],
)
def test_other_layers_give_their_own_dtype_too(layer, shape):
    model = nn.Sequential(copy.deepcopy(layer)).bfloat16()
    convpeft.inject(model, Spec(rules=[Rule("0", "lora", rank=2)]), dtype=torch.float32)
    exact, x = copy.deepcopy(trained(model)).double(), torch.randn(shape).bfloat16()
    output, wanted = model(x), exact(x.double())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_adapters_in_half_on_a_float32_base():
    model = adapted(KINDS["bottleneck"], torch.float32, "bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    exact = copy.deepcopy(trained(model)).double()
    output, wanted = model(images(torch.float32)), exact(images(torch.float32).double())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), wanted, rtol=0.03, atol=0.03)


def test_small_steps_are_not_lost():
    """A step of 1e-4 from 1 is nothing in bfloat16."""
    moved = {}
    for dtype in (None, "float32"):
        model = adapted(KINDS["bottleneck"], torch.bfloat16, dtype)
        gate = dict(model.named_parameters())["2.convpeft.default.gate"]
        nn.init.normal_(dict(model.named_parameters())["2.convpeft.default.up.weight"])
        model(images(torch.bfloat16)).float().square().sum().backward()
        torch.optim.AdamW([gate], lr=1e-4, weight_decay=0).step()
        moved[dtype] = abs(float(gate) - 1)
    assert moved == {None: 0.0, "float32": pytest.approx(1e-4, rel=1e-2)}


def test_a_gradient_scaler_takes_them():
    model = adapted(KINDS["lora"], torch.float16)
    optimizer, scaler = (
        torch.optim.SGD(convpeft.param_groups(model, lr=0.1)),
        torch.amp.GradScaler("cpu", init_scale=4.0),
    )
    output = model(images(torch.float16)).float().sum()
    scaler.scale(output).backward()
    before = dict(model.named_parameters())["2.convpeft.default.up"].detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(dict(model.named_parameters())["2.convpeft.default.up"], before)


@pytest.mark.parametrize("rule", ["lora", "dora", "rep_mona", "rep_mona-output"])
def test_merged_they_leave_a_plain_base_in_its_own_dtype(rule):
    model = trained(adapted(KINDS[rule], torch.bfloat16)).eval()
    merged = convpeft.merge(model)
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.bfloat16}
    exact = copy.deepcopy(model).double()(images(torch.bfloat16).double())
    output = merged(images(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert float((output.double() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_merged_onto_a_module_without_tensors_of_its_own():
    model = net().bfloat16().eval()
    convpeft.inject(model, Spec(rules=[Rule("3", "lora", place="output", rank=2, channels=16)]), dtype="float32")
    merged = convpeft.merge(trained(model))
    assert {tensor.dtype for tensor in merged.state_dict().values()} == {torch.bfloat16}
    assert merged(images(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("any_base", [False, True])
@pytest.mark.parametrize(("asked", "kept"), [(None, "float32"), ("float64", "float64"), ("bfloat16", "bfloat16")])
def test_a_file_keeps_the_dtype_and_loading_can_ask_for_another(asked, kept, any_base, tmp_path):
    model = trained(adapted(KINDS["rep_mona-norm"], torch.bfloat16))
    path, other = convpeft.save_adapter(model, tmp_path / "a.safetensors"), net().bfloat16()
    convpeft.load_adapter(other, path, dtype=asked, any_base=any_base)
    wanted = torch.bfloat16 if any_base and asked is None else getattr(torch, kept)
    adapter, saved = (m.get_submodule("2.convpeft.default").state_dict() for m in (other, model))
    floating = {key: tensor for key, tensor in adapter.items() if tensor.is_floating_point()}
    assert {tensor.dtype for tensor in floating.values()} == {wanted}
    assert all(torch.equal(tensor, saved[key].to(wanted)) for key, tensor in floating.items())
    assert {p.dtype for name, p in other.named_parameters() if "convpeft" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["flaot32", torch.int64, torch.complex64, "int8", 32, float, "float8_e4m3fn"])
def test_a_dtype_that_adapters_cannot_have_is_refused(dtype, tmp_path):
    model = net()
    text = "dtype must be one of float16, bfloat16, float32, float64 .*; the model is unchanged"
    with pytest.raises(convpeft.ConvPeftError, match=text):
        convpeft.inject(model, Spec(rules=[Rule("2", "lora")]), dtype=dtype)
    assert type(model[2]) is nn.Conv2d
    path = convpeft.save_adapter(adapted(KINDS["lora"], torch.float32), tmp_path / "a.safetensors")
    with pytest.raises(convpeft.ConvPeftError, match=text):
        convpeft.load_adapter(model, path, dtype=dtype)
    assert type(model[2]) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "torch.float32"], ids=str)
def test_a_dtype_is_taken_by_name_or_as_itself(dtype):
    model = adapted(KINDS["lora"], torch.bfloat16, dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_parameters_cast_by_hand_leave_a_norms_statistics_behind():
    """The usual cure before ``dtype=``: only the parameters become float32, the buffers stay."""
    model = adapted(KINDS["rep_mona-norm"], torch.bfloat16, None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    output = model(images(torch.bfloat16))
    output.float().sum().backward()
    norm = model[2].convpeft["default"].branches[0].norm
    assert output.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32


NUMBERS = [
    {"kind": "lora", "rank": numpy.int64(4), "alpha": numpy.float32(0.5), "pointwise": numpy.bool_(True)},
    {"kind": "rep_mona", "rank": numpy.int32(4), "kernel_sizes": numpy.array([3, 5])},
    {"kind": "rep_mona", "kernel_sizes": (numpy.int8(3), numpy.uint16(5)), "lr_mult": numpy.float64(0.25)},
    {"kind": "bottleneck", "channels": numpy.int64(16), "dropout": numpy.float16(0.5), "norm": numpy.str_("group")},
    {"kind": "lora", "where": {"min_channels": numpy.int64(2), "kernel_size": [numpy.int64(3), 3]}},
]


@pytest.mark.parametrize("rule", NUMBERS, ids=[str(number) for number in range(len(NUMBERS))])
def test_numbers_of_numpy_are_read_as_pythons_and_can_be_saved(rule, tmp_path):
    model, spec = net(), Spec.from_dict({"rules": [{"match": "2", **rule}]})
    assert Spec.from_dict({"rules": [Rule("2", **rule)]}) == spec
    spec.save(tmp_path / "a.yaml")
    spec.save(tmp_path / "a.json")
    assert Spec.load(tmp_path / "a.yaml") == Spec.load(tmp_path / "a.json") == spec
    convpeft.inject(model, spec)
    path = convpeft.save_adapter(trained(model), tmp_path / "a.safetensors")
    again = net()
    convpeft.load_adapter(again, path)
    assert torch.equal(again.eval()(images(torch.float32)), model.eval()(images(torch.float32)))
    layer = convpeft.inspect_adapter(path).layers["2"]
    assert all(type(value).__module__ == "builtins" for value in layer.options.values())
    assert layer.lr_mult == float(rule.get("lr_mult", 1.0))


def test_numbers_put_into_a_rule_afterwards_can_be_saved(tmp_path):
    rule = Rule("2", "lora", rank=2)
    rule.options["rank"] = numpy.int64(3)
    Spec(rules=[rule], unfreeze=[convpeft.Unfreeze("0", lr_mult=numpy.float32(0.5))]).save(tmp_path / "a.yaml")
    spec = Spec.load(tmp_path / "a.yaml")
    assert spec.rules[0].options == {"rank": 3}
    assert spec.unfreeze[0].lr_mult == 0.5
