"""Example inputs in every form a detector takes them in, for a plan, an injection and a merge."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

import convpeft
from convpeft import MergeError, SpecError
from convpeft.planning.examples import readings
from tests.detector import Untouched, scrambled
from tests.planning.refusals import refused


class Base(nn.Module):
    """Has a block whose channels only a run tells."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 6, 1), Gate()

    def body(self, x):
        return self.gate(self.conv(x))


class Gate(nn.Module):
    def forward(self, x):
        return x * x.mean((1, 2, 3), keepdim=True)


class Images(Base):
    def forward(self, images: list, targets=None):
        if not isinstance(images, list):
            raise TypeError("a list of images, please")
        return [self.body(image[None]) for image in images]


class Keywords(Base):
    def forward(self, *, pixels, scale=1):
        return {"map": self.body(pixels) * scale}


class Batch(Base):
    def forward(self, batch):
        return self.body(batch["img"])


class Two(Base):
    def forward(self, x, y):
        return self.body(x + y)


X = torch.randn(1, 3, 8, 8)
FORMS = [
    (Images, [X[0], X[0]]),
    (Images, [X[0]]),
    (Images, ([X[0], X[0]],)),
    (Keywords, {"pixels": X}),
    (Keywords, {"pixels": X, "scale": 2}),
    (Keywords, UserDict(pixels=X)),
    (Batch, {"img": X}),
    (Batch, ({"img": X},)),
    (Two, [X, X]),
    (Two, (X, X)),
]


@pytest.mark.parametrize(("kind", "example"), FORMS)
def test_every_form_plans_and_merges(kind, example):
    model = kind().eval()
    before = Untouched(model)
    rules = [
        {"match": "gate", "kind": "lora", "place": "output", "rank": 2},
        {"match": "conv", "kind": "lora", "rank": 2},
    ]
    report = convpeft.plan(model, {"rules": rules}, example_inputs=example)
    assert {layer.name: layer.site.geometry.out_channels for layer in report.layers} == {"conv": 6, "gate": 6}
    before.check()
    convpeft.inject(model, {"rules": rules}, example_inputs=example)
    scrambled(model)
    call = readings(model, example)[-1 if kind in (Images, Batch) else 0]
    with torch.no_grad():
        expected, merged = model(*call.args, **call.kwargs), convpeft.merge(model, example_inputs=example)
        torch.testing.assert_close(merged(*call.args, **call.kwargs), expected)
    assert convpeft.plan_merge(model, example_inputs=example).rows


@pytest.mark.parametrize(
    ("kind", "example", "text"),
    [
        (Images, X, r"TypeError: a list of images, please"),
        (Images, [X, X], r"as 2 positional inputs, TypeError: a list of images, please; as one list, "),
        (Keywords, X, r"TypeError: .*forward\(\) takes 1 positional argument"),
        (Keywords, {"image": X}, r"TypeError: .*unexpected keyword argument 'image'"),
        (Batch, {"image": X}, r"KeyError: 'img'"),
        (Two, X, r"TypeError: .*missing 1 required positional argument: 'y'"),
    ],
)
def test_what_the_model_raises_is_said_in_words(kind, example, text):
    rule = {"match": "gate", "kind": "lora", "place": "output", "rank": 2}
    words = rf"cannot plan for this {kind.__name__}: it failed on the example inputs: {text}"
    refused({"rules": [rule]}, SpecError, words, kind().eval(), example_inputs=example)
    try:
        convpeft.plan(kind().eval(), {"rules": [rule]}, example_inputs=example)
    except SpecError as error:
        assert isinstance(error.__cause__, (TypeError, KeyError))  # noqa: PT017
    model = kind().eval()
    convpeft.inject(model, {"rules": [{"match": "conv", "kind": "lora"}]})
    before = Untouched(model)
    for verb in (convpeft.merge, convpeft.plan_merge):
        with pytest.raises(MergeError, match=rf"{kind.__name__} failed on the example inputs: {text}"):
            verb(model, example_inputs=example)
    before.check()
