"""Fusing merged models in mmcv's layout: the same numbers from fewer layers, or a refusal; mmcv's own way is never silent."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convpeft
from convpeft.integrations.mmcv import fuse_conv_bn
from tests.cases import assert_relative, bits, same_bits
from tests.hosts.fusing import Whole
from tests.references.mmyolo_skeleton import WorldImagePart

NECK = "neck.*.*.final_conv.conv"
BESIDE = {"match": NECK, "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 7]}


def mmcvs_own(module: Any) -> Any:
    """Fuse as mmcv describes it: each norm into the convolution that is the child before it, by name."""
    last, last_name = None, None
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if last is not None:
                factor = child.weight / torch.sqrt(child.running_var + child.eps)
                bias = last.bias if last.bias is not None else torch.zeros_like(child.running_mean)
                last.weight = nn.Parameter(last.weight * factor.reshape(-1, 1, 1, 1))
                last.bias = nn.Parameter((bias - child.running_mean) * factor + child.bias)
                module._modules[last_name] = last
                module._modules[name] = nn.Identity()
            last = None
        elif isinstance(child, nn.Conv2d):
            last, last_name = child, name
        else:
            mmcvs_own(child)
    return module


class World(WorldImagePart):
    """With the method of mmyolo's detector that prepares texts for a demo."""

    def reparameterize(self, texts: Tensor) -> None:
        self.texts = texts / texts.norm(dim=-1, keepdim=True)


def world(rules: list[dict[str, Any]] | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = World("n").double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    if rules:
        convpeft.inject(model, {"rules": rules})
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    return model


def outputs(model: nn.Module) -> list[Tensor]:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return [part for pair in model(images) for part in pair]


def assert_same(model: nn.Module, expected: list[Tensor]) -> None:
    for got, wanted in zip(outputs(model), expected, strict=True):
        assert_relative(got, wanted, 1e-10)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("form", ["factored", "single"])
def test_a_merged_model_fuses_to_the_same_output(form):
    model = world([BESIDE, {"match": "backbone.**.conv1.conv", "kind": "lora", "rank": 2}])
    expected = outputs(model)
    plain = convpeft.merge(model, form=form)
    fused = fuse_conv_bn(plain)
    assert fused is plain
    assert_same(fused, expected)
    assert norms(world()) > 50
    assert norms(fused) == 3  # of the contrastive heads, which have no convolution
    assert_same(fuse_conv_bn(fused), expected)
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float64}


def test_a_model_that_convpeft_never_saw_fuses_as_mmcv_does():
    model = world()
    expected, own = outputs(model), mmcvs_own(copy.deepcopy(model))
    fused = fuse_conv_bn(model)
    assert_same(fused, expected)
    assert [(name, type(module)) for name, module in fused.named_modules()] == [
        (name, type(module)) for name, module in own.named_modules()
    ]
    for name, tensor in own.state_dict().items():
        assert_relative(fused.state_dict()[name], tensor, 1e-10)


def test_chains_on_blocks_are_no_hindrance():
    model = world(
        [{"match": "neck.top_down_layers.0", "kind": "rep_mona", "rank": 2, "place": "output", "channels": 128}]
    )
    expected = outputs(model)
    assert_same(fuse_conv_bn(convpeft.merge(model)), expected)


@pytest.mark.parametrize("match", [NECK, "neck.*.*.final_conv.bn"], ids=["between", "on-the-norm"])
def test_chains_that_fusing_would_pass_by_are_refused(match):
    rule = {"match": match, "kind": "rep_mona", "rank": 2, "kernel_sizes": [3], "place": "output"}
    plain = convpeft.merge(world([rule]))
    before, expected = bits(plain), outputs(plain)
    with pytest.raises(
        convpeft.HostError, match=r"pass by the chains .* at neck\.top_down_layers\.0\.final_conv\.conv"
    ):
        fuse_conv_bn(plain)
    assert same_bits(bits(plain), before)
    assert_same(plain, expected)


def test_an_adapted_model_is_refused():
    model = world([BESIDE])
    before = bits(model)
    with pytest.raises(convpeft.HostError, match=r"this World still carries adapters.*convpeft\.merge\(model\) first"):
        fuse_conv_bn(model)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "factored"])
def test_mmcvs_own_way_is_refused_when_it_is_done(merged):
    """At the first layer with an adapter or a chain, before that is touched; the pairs before it are the same as one."""
    model = world([BESIDE])
    model = convpeft.merge(model, form="factored") if merged else model
    expected = outputs(model)
    text = (
        "as if it was fused with a norm after a factored merge" if merged else "carries adapters, and giving it another"
    )
    with pytest.raises(convpeft.HostError, match=text):
        mmcvs_own(model)
    assert_same(model, expected)
    assert norms(model) > 3


@pytest.mark.parametrize("how", ["adapted", "factored", "single"])
def test_preparing_texts_is_no_fusing(how):
    model = world([BESIDE])
    model = model if how == "adapted" else convpeft.merge(model, form=how)
    texts = torch.randn(1, 2, 512, dtype=torch.float64)
    model.reparameterize(texts)
    assert torch.equal(model.texts, texts / texts.norm(dim=-1, keepdim=True))
    assert [part.shape[1] for part in outputs(model)][::2] == [2, 2, 2]


class Odd(nn.Module):
    """Pairs that must keep their norm: a weight that is computed, a layer used twice, a norm that runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = Standardised(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first = Twice()
        self.second = NormFirst()
        self.plain = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.SyncBatchNorm(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.second(self.first(self.bn(self.conv(x)))))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.bn(self.conv(x)))


class NormFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.order = ("norm", "conv", "act")
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


def test_what_is_no_pair_keeps_its_norm():
    torch.manual_seed(0)
    model, x = Odd().double().eval(), torch.randn(1, 3, 8, 8).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    expected = model(x)
    fuse_conv_bn(model)
    assert_relative(model(x), expected)
    assert [type(module) for module in (model.bn, model.first.bn, model.second.bn)] == [nn.BatchNorm2d] * 3
    assert [type(module) for module in model.plain] == [nn.Conv2d, nn.Identity] * 2


def test_an_interrupt_gives_everything_back(monkeypatch):
    from convpeft.integrations import mmcv

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double().eval()
    before, own = Whole(model), mmcv.fold

    def interrupted(conv, norm):
        if conv is model[2]:
            raise KeyboardInterrupt
        own(conv, norm)

    monkeypatch.setattr(mmcv, "fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuse_conv_bn(model)
    before.check()
