"""Copies and averages of adapted models, in other precisions and layouts: every adapter goes along and still switches."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import convpeft
from tests.cases import assert_relative, bits, same_bits
from tests.detector import detector, images, scrambled

SPECS = {
    "lora-parallel": {"rules": [{"match": "body.*.conv", "kind": "lora", "rank": 2}], "unfreeze": ["score"]},
    "lora-output": {
        "rules": [{"match": ["neck", "body.*.conv"], "kind": "lora", "place": "output", "rank": 2}],
        "unfreeze": ["score"],
    },
    "rep_mona-parallel": {"rules": [{"match": "body.*.conv", "kind": "rep_mona", "rank": 2}], "unfreeze": ["score"]},
    "rep_mona-output": {
        "rules": [{"match": ["neck", "body.*.conv"], "kind": "rep_mona", "place": "output", "rank": 2}],
        "unfreeze": ["score"],
    },
}
OTHER = {"rules": [{"match": ["stem.conv", "body.0.conv"], "kind": "lora", "rank": 2}], "unfreeze": ["box"]}
each_spec = pytest.mark.parametrize("name", SPECS)


def two_adapters(name: str) -> nn.Module:
    """Return a detector with ``a``, which adapts norms and unfreezes the scores, active, and ``b``; none the identity."""
    model = detector()
    convpeft.inject(model, {**SPECS[name], "norm": "adapt"}, name="a")
    convpeft.inject(model, OTHER, name="b")
    scrambled(model)
    convpeft.set_active(model, "a")
    return model


def outputs(model: nn.Module, x: torch.Tensor, root: nn.Module | None = None) -> dict[str | None, torch.Tensor]:
    """Return what each adapter gives, and the bare base; ``a`` is active afterwards."""
    found = {}
    for key in ("b", None, "a"):
        convpeft.set_active(model, key)
        found[key] = (root or model)(x).detach()
    return found


AVERAGES = {
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "torch-buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm": lambda model: ModelEmaV3(model, decay=0.9),
    "timm-one-by-one": lambda model: ModelEmaV3(model, decay=0.9, foreach=False),
}


class TestAverages:
    @pytest.mark.parametrize("kind", AVERAGES)
    @each_spec
    def test_several_steps_equal_the_average_by_hand(self, name, kind):
        model, x = two_adapters(name).train(), images()
        average = AVERAGES[kind](model)
        update = average.update if kind.startswith("timm") else average.update_parameters
        if kind.startswith("torch"):
            update(model)  # the first one copies
        by_hand = {key: value.detach().clone() for key, value in model.named_parameters()}
        start = copy.deepcopy(by_hand)
        optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            update(model)
            by_hand = {key: 0.9 * by_hand[key] + 0.1 * value.detach() for key, value in model.named_parameters()}
        found = dict(average.module.named_parameters())
        assert found.keys() == by_hand.keys()
        moved = {key for key in found if not torch.equal(start[key], found[key])}
        for key, value in by_hand.items():
            torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14, msg=key)
        assert {key for key in moved if ".convpeft.a." in key}
        assert {"score.weight", "score.bias"} <= moved
        assert not {key for key in moved if ".convpeft.b." in key or "_base" in key}

    @pytest.mark.parametrize("kind", AVERAGES)
    def test_the_average_switches_merges_and_ejects_by_itself(self, kind):
        model, x = two_adapters("rep_mona-parallel"), images()
        average = AVERAGES[kind](model)
        before, expected = bits(model), outputs(model, x)
        for found in (outputs(average, x), outputs(average.module, x)):
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert convpeft.active_adapters(average) == ("a",)
        assert_relative(convpeft.merge(average.module)(x), expected["a"])
        convpeft.eject(average)
        assert torch.equal(average.module(x), expected[None])
        assert torch.equal(model(x), expected["a"])
        assert same_bits(before, bits(model))


class TestPrecisionAndLayout:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @each_spec
    def test_every_tensor_follows_the_hidden_ones_too(self, name, dtype):
        model, x = two_adapters(name).to(dtype), images().to(dtype)
        assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
        for output in outputs(model, x).values():
            assert output.dtype == dtype
        reference = copy.deepcopy(model).double()
        merged = convpeft.merge(model, form="single")
        assert merged(x).dtype == dtype
        exact = convpeft.merge(reference, form="single")(x.double())
        assert_relative(exact, reference(x.double()))
        convpeft.eject(model)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}

    @each_spec
    def test_half_and_back_loses_no_adapter(self, name):
        model, x = two_adapters(name).half().double(), images()
        found = outputs(model, x)
        assert not torch.equal(found["a"], found["b"])
        assert not torch.equal(found["a"], found[None])

    @each_spec
    def test_channels_last_reaches_the_hidden_ones_too(self, name):
        model, x = two_adapters(name), images()
        expected = outputs(model, x)
        model.to(memory_format=torch.channels_last)
        found = outputs(model, x.to(memory_format=torch.channels_last))
        for key, output in expected.items():
            assert_relative(found[key], output)
        for key in ("b", None, "a"):
            convpeft.set_active(model, key)
            kernels = [p for p in model.parameters() if p.ndim == 4]
            assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)

    @each_spec
    def test_to_meta_and_back_keeps_the_structure(self, name):
        model = two_adapters(name)
        keys, checkpoint, x = list(model.state_dict()), bits(model), images()
        output = model(x)
        model.to("meta").to_empty(device="cpu")
        assert list(model.state_dict()) == keys
        model.load_state_dict(checkpoint)
        assert torch.equal(model(x), output)


class TestOptimizers:
    @each_spec
    def test_the_bases_optimizer_survives_inject_training_and_eject(self, name):
        model, x = detector(), images()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        objects = [id(parameter) for parameter in model.parameters()]
        state = copy.deepcopy(optimizer.state_dict())
        twin = copy.deepcopy(model)
        convpeft.inject(model, {**SPECS[name], "norm": "adapt"})
        adapters = torch.optim.Adam(convpeft.param_groups(model, lr=1e-2))
        model(x).square().sum().backward()
        adapters.step()
        convpeft.eject(model)
        assert [id(parameter) for parameter in model.parameters()] == objects
        for key, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(values[each], state["state"][key][each]) for each in values)
        other = torch.optim.Adam(twin.parameters(), lr=1e-2)
        other.load_state_dict(state)
        for each, optimiser in ((model, optimizer), (twin, other)):
            each.zero_grad()
            each(x).square().sum().backward()
            optimiser.step()
        assert same_bits(bits(model), bits(twin))

    @each_spec
    def test_merging_a_copy_does_not_disturb_the_training(self, name):
        runs = []
        for merges in (False, True):
            torch.manual_seed(0)
            model, x = two_adapters(name).train(), images()
            optimizer = torch.optim.Adam(convpeft.param_groups(model, lr=1e-2))
            for _ in range(3):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
                if merges:
                    merged = convpeft.merge(model)
                    assert_relative(merged.eval()(x), copy.deepcopy(model).eval()(x))
            runs.append(bits(model))
        assert same_bits(*runs)
