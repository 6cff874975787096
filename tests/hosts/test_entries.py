"""Outputs that an adapter cannot add to: entries that are not there, and tensors that are no images."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

import convpeft
from convpeft import HostError, SpecError
from tests.detector import Block, Untouched, scrambled

Pair = namedtuple("Pair", "low high")


class Gives(nn.Module):
    """Returns what ``form`` makes of its block's output."""

    def __init__(self, form):
        super().__init__()
        self.inner, self.form = Block(3, 4), form

    def forward(self, x):
        return self.form(self.inner(x))


FORMS = [
    (lambda x: (x, x), 3, r"returned a tuple without an entry 3; there are: 0, 1"),
    (lambda x: [x], "features", r"returned a list without an entry 'features'; there are: 0"),
    (lambda x: {"low": x}, "high", r"returned a dict without an entry 'high'; there are: 'low'"),
    (lambda x: {}, 0, r"returned a dict without an entry 0; there are: none"),
    (lambda x: Pair(x, x), "middle", r"returned a Pair without an entry 'middle'; there are: 0, 1, 'low', 'high'"),
    (lambda x: x, 0, r"returned a tensor, which has no entry 0"),
    (lambda x: x, "low", r"returned a tensor, which has no entry 'low'"),
    (lambda x: (x, None), 1, r"entry 1 of the tuple that the module returned is a NoneType, not a tensor"),
    (lambda x: None, 0, r"returned a NoneType without an entry 0"),
]


@pytest.mark.parametrize(("form", "entry", "text"), FORMS)
def test_an_entry_that_is_not_there_is_said(form, entry, text):
    model, x = nn.ModuleDict({"gives": Gives(form)}).eval(), torch.randn(2, 3, 8, 8)
    rule = {"match": "gives", "kind": "lora", "place": "output", "output": entry}
    before = Untouched(model)
    with pytest.raises(SpecError, match=rf"could not be found out \(.*{text}\)"):
        convpeft.inject(model, {"rules": [rule]})
    before.check()
    convpeft.inject(model, {"rules": [{**rule, "channels": 4}]})  # the rule tells all that a run would
    with pytest.raises(HostError, match=rf"{text}: correct 'output: {entry}' in the rule"):
        model.gives(x)


def planned(module, **rule):
    model = nn.ModuleDict({"layer": module}).eval()
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": "lora", "place": "output", **rule}]})
    return scrambled(model).layer


@pytest.mark.parametrize("kind", ["lora", "rep_mona", "bottleneck", "hierarchical", "mona", "moe_rep_mona"])
@pytest.mark.parametrize("size", [(6, 7), (4, 4)])
def test_an_image_without_its_batch_axis_is_one_of_a_batch(kind, size):
    """Also where its height is the number of channels."""
    layer, x = planned(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), kind=kind), torch.randn(3, *size)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    assert layer(x).shape == plain(x).shape


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.GroupNorm(2, 4), (2, 4, 5)),
        (nn.GroupNorm(2, 4), (4, 4, 5)),
        (nn.GroupNorm(2, 4), (2, 4)),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3, 3)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(0, 2)), (2, 3, 4, 5)),
        (nn.Identity(), (5, 4, 6)),
    ],
)
def test_what_is_no_image_is_refused_in_words(module, shape):
    layer = planned(module, channels=4)
    with pytest.raises(
        HostError, match=r"returned a tensor of shape \(.*planned for images, \(N, 4, H, W\) or \(C, H, W\)"
    ):
        layer(torch.randn(shape))


def test_tokens_of_any_number_of_axes_take_a_channels_last_adapter():
    layer = planned(nn.Linear(3, 4))
    x = torch.randn(2, 3, 5, 3)
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]))
