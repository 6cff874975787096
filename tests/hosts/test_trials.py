"""Copies of modules to try things on: whatever a module keeps is copied, and nobody sees that they ran."""

from __future__ import annotations

import copy
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import convpeft
from convpeft.hosts.trials import deep_copy, private_copy
from tests.cases import assert_relative

SEEN: list[Any] = []
COUNT = 0


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Cache:
    maps: dict[str, Any] = field(default_factory=dict)


class Slotted:
    __slots__ = ("map",)

    def __init__(self, value: Any) -> None:
        self.map = value


KEEP = {
    "attribute": lambda y: y,
    "list": lambda y: [y, y],
    "dict": lambda y: {"a": {"b": [y]}},
    "tuple": lambda y: (1, (y,)),
    "namedtuple": lambda y: Pair(y, None),
    "deque": lambda y: deque([y], maxlen=3),
    "dataclass": lambda y: Cache({"y": y}),
    "slots": Slotted,
    "partial": lambda y: partial(torch.add, y),
}


class Keeping(nn.Conv2d):
    """Keeps its output of the last pass, with its graph."""

    def __init__(self, keep: Any) -> None:
        super().__init__(3, 3, 3, padding=1)
        self.keep, self.kept = keep, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.kept = self.keep(y)
        return y


def adapted(model: nn.Module, **rule: Any) -> nn.Module:
    torch.manual_seed(0)
    convpeft.inject(model.double().eval(), {"rules": [{"match": "0", "kind": "lora", "rank": 2, **rule}]})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("how", KEEP)
def test_a_cache_with_its_graph_is_merged(how):
    model = adapted(nn.Sequential(nn.Conv2d(3, 3, 1), Keeping(KEEP[how])))
    expected = model(image())
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(model)
    merged = convpeft.merge(model, form="factored", example_inputs=image())
    assert_relative(merged(image()), expected)


def test_the_same_tensor_in_two_places_stays_one():
    model = adapted(nn.Sequential(nn.Conv2d(3, 3, 1), Keeping(lambda y: [y, {"same": y}])))
    model(image())
    copied = deep_copy(model)
    first, second = copied[1].kept
    assert second["same"] is first
    assert first.grad_fn is None
    assert torch.equal(first, model[1].kept[0])
    assert model[1].kept[0].grad_fn is not None


def closure():
    seen: list[Any] = []
    return seen, lambda module, args, output: seen.append(output.shape)


def counting():
    count = [0]

    def hook(module, args, output):
        nonlocal total
        total += 1
        count[0] = total

    total = 0
    return count, hook


def in_globals():
    SEEN.clear()

    def note(value):
        SEEN.append(value)

    return SEEN, lambda module, args, output: far_note(output.shape) or note(output.shape)


def far_note(value: Any) -> None:
    global COUNT
    COUNT += 1
    SEEN.append(value)


def by_default():
    seen: dict[str, Any] = {}

    def hook(module, args, output, *, store=seen):
        store["last"] = output

    return seen, hook


def of_an_object():
    class Recorder:
        def __init__(self):
            self.seen: list[Any] = []

        def note(self, module, args, output):
            self.seen.append(output)

    recorder = Recorder()
    return recorder.seen, recorder.note


def of_a_trainer():
    class Trainer:
        def __init__(self):
            self.seen, self.lock = [], threading.Lock()

        def __call__(self, module, args, output):
            self.seen.append(output)

    trainer = Trainer()
    return trainer.seen, trainer


HOOKS = [closure, counting, in_globals, by_default, of_an_object]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["single", "factored"])
@pytest.mark.parametrize("make", [*HOOKS, of_a_trainer])
def test_a_users_hook_sees_nothing_of_a_merge(make, form, inplace):
    seen, hook = make()
    model = adapted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    model[0].register_forward_hook(hook)
    expected = model(image())
    before = len(seen) if make is not counting else seen[0]
    assert before
    convpeft.plan_merge(model)
    merged = convpeft.merge(model, form=form, inplace=inplace)
    assert (len(seen) if make is not counting else seen[0]) == before
    assert_relative(merged(image()), expected)


@pytest.mark.parametrize("make", HOOKS)
def test_a_users_hook_sees_nothing_of_inject(make):
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(x)

    seen, hook = make()
    model = nn.Sequential(Own(3, 4, 3), Block())
    for part in model:
        part.register_forward_hook(hook)
    before = len(seen) if make is not counting else seen[0]
    rules = [{"match": "0", "kind": "lora"}, {"match": "1", "kind": "bottleneck"}]
    convpeft.inject(model, {"rules": rules})
    assert (len(seen) if make is not counting else seen[0]) == before


def test_hooks_for_all_modules_see_nothing_and_stay():
    seen: list[Any] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        model = adapted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        convpeft.merge(model)
        assert seen == []
        model(image())
        assert nn.ReLU in seen
    finally:
        handle.remove()


def test_a_hook_that_changes_the_output_still_counts():
    """It reads the layer's weight, which a merge into one kernel would change: only a chain is right."""
    model = adapted(nn.Sequential(nn.Conv2d(3, 4, 3)))
    model[0].register_forward_hook(lambda module, args, output: output + module.weight.sum())
    expected = model(image())
    with pytest.raises(convpeft.MergeError, match="does not compute what the adapted one does"):
        convpeft.merge(model, form="single")
    assert_relative(convpeft.merge(model)(image()), expected)


def test_a_private_copys_hooks_work_on_copies():
    seen, hook = closure()
    layer = nn.Conv2d(3, 3, 1)
    layer.register_forward_hook(hook)
    copied = private_copy(layer)
    copied(torch.ones(1, 3, 2, 2))
    assert seen == []
    layer(torch.ones(1, 3, 2, 2))
    assert seen == [(1, 3, 2, 2)]


class TestInferenceMode:
    """Weights that were made, or models that are merged, under ``torch.inference_mode``."""

    @staticmethod
    def made() -> nn.Module:
        torch.manual_seed(0)
        with torch.inference_mode():
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).double().eval()

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("rule", [{"kind": "lora"}, {"kind": "rep_mona", "place": "output"}])
    @pytest.mark.parametrize("form", ["auto", "factored"])
    def test_merging_weights_that_were_made_in_it(self, form, rule, inplace):
        model = self.made()
        flags = [parameter.requires_grad for parameter in model.parameters()]
        convpeft.inject(model, {"rules": [{"match": "0", "rank": 2, **rule}]})
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            expected = model(image())
            merged = convpeft.merge(model, form=form, inplace=inplace, example_inputs=image())
            assert_relative(merged(image()), expected)
        own = dict(merged.named_parameters())
        assert [own[name].requires_grad for name, _ in self.made().named_parameters() if own[name] is not None] == flags
        if not inplace:
            merged.requires_grad_(True)
            merged(image()).sum().backward()

    def test_ejecting_gives_the_flags_back(self):
        model = self.made()
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]})
        convpeft.eject(model)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_a_model_merged_in_it_trains(self):
        model = adapted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)))
        with torch.inference_mode():
            merged = convpeft.merge(model)
        assert not any(parameter.is_inference() for parameter in merged.parameters())
        merged.requires_grad_(True)(image()).sum().backward()
        assert merged[0].weight.grad is not None
