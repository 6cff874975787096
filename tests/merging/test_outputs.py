"""Adapters on the outputs of blocks merge into a chain after them, whatever the block gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import assert_relative, named, randomised
from tests.merging.layers import LORA_OUT, REP_MONA_OUT, assert_plain


class Scaled(nn.Module):
    """A block with more than one output."""

    def __init__(self, pack) -> None:
        super().__init__()
        self.conv, self.pack = nn.Conv2d(4, 6, 3, padding=1), pack

    def forward(self, x):
        return self.pack(self.conv(x))


def pair(z):
    return z.sigmoid(), z


def mapping(z):
    return {"maps": z.relu(), "other": z}


def listed(z):
    return [z, 2 * z]


@pytest.mark.parametrize("form", ["auto", "single", "factored"])
@pytest.mark.parametrize(("pack", "entry"), [(pair, 1), (mapping, "maps"), (listed, 0)], ids=["tuple", "dict", "list"])
@pytest.mark.parametrize("variant", named([LORA_OUT, REP_MONA_OUT]))
@torch.no_grad()
def test_output_hosts_merge_into_a_chain_after_them(variant, pack, entry, form):
    model, x = nn.ModuleDict({"layer": Scaled(pack)}).double().eval(), torch.randn(2, 4, 9, 8).double()
    convpeft.inject(model, {"rules": [{**variant.rule, "output": entry, "channels": 6}]}, example_inputs=None)
    randomised(model)
    block = model["layer"]
    expected = block(x)
    merged = convpeft.merge(model, form=form)["layer"]
    got = merged(x)
    assert type(got) is type(expected)
    keys = expected if isinstance(expected, dict) else range(len(expected))
    for key in keys:
        assert_relative(got[key], expected[key], 1e-12 if key == entry else 0)
    assert type(merged) is Scaled
    assert_plain(merged)


class Sequence(nn.Module):
    """A Sequential as a child, with a shared last step or not."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*steps)

    def forward(self, x):
        return self.layer(x)


SEQUENCES = {
    "conv-last": lambda: Sequence(nn.ReLU(), nn.Conv2d(4, 6, 3)),
    "relu-last": lambda: Sequence(nn.Conv2d(4, 6, 3), nn.ReLU()),
    "norm-last": lambda: Sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "nested": lambda: Sequence(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 1)))),
}


@pytest.mark.parametrize("form", ["auto", "factored"])
@pytest.mark.parametrize("variant", named([LORA_OUT, REP_MONA_OUT]))
@pytest.mark.parametrize("name", list(SEQUENCES))
@torch.no_grad()
def test_a_sequential_stays_a_sequential(name, variant, form):
    model, x = SEQUENCES[name]().double().eval(), torch.randn(2, 4, 9, 8).double()
    steps = len(model.layer)
    convpeft.inject(model, {"rules": [variant.rule]}, example_inputs=x)
    randomised(model)
    merged = convpeft.merge(model, form=form)
    assert_relative(merged(x), model(x))
    assert type(merged.layer) is nn.Sequential
    assert len(merged.layer) == steps
    assert_plain(merged)
