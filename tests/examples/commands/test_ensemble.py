"""Ensembles: the weighted sum of adapters is exact in weight space, or it is refused and boxes are fused."""

from __future__ import annotations

import json
from functools import reduce

import pytest
import torch
from torch import Tensor

pytest.importorskip("ultralytics")
pytest.importorskip("ensemble_boxes")

import convpeft
from examples.yolo_world.commands import ensemble
from examples.yolo_world.commands.proofs import raw_output
from examples.yolo_world.training.model import load_world_model, use_classes
from examples.yolo_world.training.scores import predict
from tests.cases import assert_relative
from tests.world import moved, pictures, world

from .place import LORA, MIXED, NONLINEAR, run

WEIGHTS = {"a": 0.7, "b": -0.4}


def pair(spec, **others):
    """Return a float64 model with two adapters of one spec, neither of them the identity."""
    model = world("n").double()
    for seed, name in enumerate(WEIGHTS, 3):
        convpeft.inject(model, others.get(name, spec), name=name)
        moved(model, seed)
    return model.eval()


def alone(model, name):
    """Return a plain copy with one adapter in it."""
    with convpeft.using(model, name):
        return convpeft.merge(model)


def test_the_sum_is_the_sum_of_kernels_tensor_by_tensor():
    model = pair(LORA)
    base = world("n").double().state_dict()
    parts = {name: alone(model, name).state_dict() for name in WEIGHTS}
    summed = ensemble.sum_in_weight_space(model, WEIGHTS).state_dict()
    assert list(summed) == list(base)
    changed = 0
    for key, start in base.items():
        expected = start + sum(weight * (parts[name][key] - start) for name, weight in WEIGHTS.items())
        assert_relative(summed[key], expected)
        changed += not torch.equal(summed[key], start)
    assert changed > 15


@pytest.mark.parametrize("layer", ["model.12.cv2.conv", "model.15.cv2.conv", "model.16", "model.2.cv1.conv", "model.22.cv3.1.2", "model.6.cv1.bn"])  # fmt: skip
def test_each_layer_gives_the_weighted_sum_of_its_outputs(layer):
    model = pair(MIXED)
    names = {"model.2.cv1.conv": 32, "model.16": 64, "model.22.cv3.1.2": 64, "model.6.cv1.bn": 128}
    channels = names.get(layer) or world("n").get_submodule(layer).in_channels
    x = torch.rand(2, channels, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5

    def at(whole) -> Tensor:
        with torch.no_grad():
            return whole.eval().get_submodule(layer)(x.clone())

    base, summed = at(world("n").double()), at(ensemble.sum_in_weight_space(model, WEIGHTS))
    parts = []
    for name, weight in WEIGHTS.items():
        with convpeft.using(model, name):
            parts.append(weight * (at(model) - base))
    assert float(reduce(torch.add, parts).abs().max()) > 1e-3
    assert_relative(summed, reduce(torch.add, parts, base))


def test_coefficients_of_one_and_zero_give_that_adapter():
    model = pair(MIXED)
    x = pictures(torch.float64)
    expected = raw_output(alone(model, "b"), x)
    assert_relative(raw_output(ensemble.sum_in_weight_space(model, {"a": 0.0, "b": 1.0}), x), expected, 1e-11)
    assert float((raw_output(world("n").double(), x) - expected).abs().max()) > 1e-3


def test_the_given_model_stays_as_it_is():
    model = pair(MIXED)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ensemble.sum_in_weight_space(model, WEIGHTS)
    assert convpeft.active_adapters(model) == ("b",)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def moved_statistics():
    model = pair({"rules": LORA["rules"], "norm": "adapt"})
    for name in WEIGHTS:
        with convpeft.using(model, name):
            model.get_submodule("model.4.cv1.bn").running_mean.add_(1.0)
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pair(NONLINEAR, b=LORA), r"model\.15: its GELU is not linear"),
        (lambda: pair({"rules": LORA["rules"], "unfreeze": ["model.22.cv4.1"]}), r"model\.22\.cv4\.1.*is not linear in .*logit_scale"),
        (moved_statistics, r"model\.4\.cv1\.bn: its statistics \(running_mean\) were adapted"),
        (lambda: pair({"rules": [{"match": "model.4.cv1.conv", "kind": "lora", "rank": 2, "dora": True}], "unfreeze": ["model.4.cv1.conv"]}),
         r"model\.4\.cv1\.conv: it is unfrozen and has an adapter that depends on its weight"),
    ],
    ids=["gelu", "logit-scale", "statistics", "dora-unfrozen"],
)  # fmt: skip
def test_what_is_not_exact_is_refused_with_the_layer_and_the_reason(make, match):
    model = make()
    with pytest.raises(ensemble.NotExact, match=f"(?s)not exact in weight space.*{match}"):
        ensemble.sum_in_weight_space(model, WEIGHTS)


def test_boxes_are_fused_by_confidence_and_weight():
    first = torch.tensor([[10.0, 10, 30, 30, 0.9, 0]])
    second = torch.tensor([[12.0, 10, 30, 30, 0.5, 0], [50, 50, 60, 60, 0.4, 1]])
    found = ensemble.fuse_boxes([first, second], [2.0, 1.0], 100)
    left = (10 * 1.8 + 12 * 0.5) / 2.3
    expected = torch.tensor([[left, 10, 30, 30, (1.8 + 0.5) / 3, 0], [50, 50, 60, 60, 0.4 / 3, 1]])
    torch.testing.assert_close(found, expected)
    empty = torch.zeros(0, 6)
    assert ensemble.fuse_boxes([empty, empty], [1.0, 1.0], 100).shape == (0, 6)


def test_the_command_sums_weights_where_that_is_exact(place, tmp_path, capsys):
    files = [place.adapter("a", MIXED, 3), place.adapter("b", MIXED, 4)]
    options = [*place.options, "--out", tmp_path, "--adapter", *files, "--coefficients", "0.7", "-0.4"]
    assert run(ensemble, options) == 0
    results = json.loads((tmp_path / "ensemble.json").read_text(encoding="utf-8"))
    assert results["method"] == "weights"
    assert results["coefficients"] == {"a": 0.7, "b": -0.4}
    assert set(results["reports"]) == {"(base)", "a", "b", "ensemble"}
    model = world("n")
    for path in files:
        convpeft.load_adapter(model, path)
    expected = use_classes(ensemble.sum_in_weight_space(model, WEIGHTS), place.texts)
    written = use_classes(load_world_model(tmp_path / "merged.pt"), place.texts)
    assert torch.equal(raw_output(written, pictures()), raw_output(expected, pictures()))
    assert "weights are summed" in capsys.readouterr().out


def test_the_command_fuses_boxes_otherwise(place, tmp_path, capsys):
    files = [place.adapter("plain", LORA, 3), place.adapter("bent", NONLINEAR, 4)]
    options = [*place.options, "--out", tmp_path, "--adapter", *files]
    assert run(ensemble, [*options, "--method", "weights"]) == 2
    assert "model.15: its GELU is not linear" in capsys.readouterr().err
    assert run(ensemble, [*options, "--coefficients", "1.5", "-0.5"]) == 2
    assert "Box fusion, which is left, wants --coefficients above 0" in capsys.readouterr().err
    assert run(ensemble, options) == 0
    results = json.loads((tmp_path / "ensemble.json").read_text(encoding="utf-8"))
    assert results["method"] == "boxes"
    assert "GELU" in results["why"]
    assert not (tmp_path / "merged.pt").exists()
    from examples.yolo_world.data.datasets import open_dataset

    data = open_dataset(place.root / "parts", size=64).test
    model, each = world("n"), []
    for path in files:
        name = convpeft.load_adapter(model, path).name
        each.append(predict(model, data, place.texts, batch_size=2))
        convpeft.eject(model, name)
    for entry, *found in zip(results["boxes"], *each, strict=True):
        expected = ensemble.fuse_boxes(found, [0.5, 0.5], 64)
        assert torch.equal(torch.tensor(entry["boxes"]).reshape(-1, 6), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "one.safetensors"], "wants two files or more"),
        (["--adapter", "a", "b", "--coefficients", "1"], "1 numbers for 2 adapters"),
        (["--adapter", "a", "b", "--coefficients", "1", "nan"], "must be finite"),
        (["--adapter", "a", "b", "--coefficients", "1", "0", "--method", "boxes"], "must be above 0 for --method boxes"),
        (["--adapter", "a", "b", "--overlap", "2"], "--overlap must lie between 0 and 1"),
    ],
)  # fmt: skip
def test_a_bad_option_is_said_in_words(arguments, message, tmp_path, capsys):
    assert run(ensemble, [*arguments, "--out", tmp_path]) == 2
    assert message in capsys.readouterr().err
