"""Evaluate: what is counted, for the base and for each adapter in turn or together."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ultralytics")
import convpeft
from examples.yolo_world.commands import evaluate
from examples.yolo_world.data.datasets import open_dataset
from examples.yolo_world.training.scores import score, targets_of
from tests.world import world

from .place import CLASSES, LORA, NONLINEAR, SIZE, read, run


def perfect(data, *, wrong: int = 0):
    """Return boxes that are the true ones, the first ``wrong`` of them with the next class."""
    found = []
    for target in targets_of(data):
        labels = target["labels"].clone()
        turned = min(wrong, len(labels))
        labels[:turned] = (labels[:turned] + 1) % len(data.classes)
        wrong -= turned
        count = len(labels)
        found.append(torch.cat([target["boxes"], torch.full((count, 1), 0.9), labels[:, None].float()], 1))
    return found


def test_the_report_counts_and_agrees_with_the_demos_scores(place):
    data = open_dataset(place.root / "parts", size=SIZE).test
    whole = evaluate.report(perfect(data), data)
    assert whole.numbers["map"] == whole.numbers["map_50"] == whole.numbers["mar_100"] == 1.0
    assert whole.numbers["map_large"] is None
    assert [(each.name, each.map50) for each in whole.classes] == [(name, 1.0) for name in CLASSES]
    assert sum(each.boxes for each in whole.classes) == sum(map(len, data.boxes))
    found = perfect(data, wrong=3)
    part, scores = evaluate.report(found, data), score(found, data)
    assert 0 < part.numbers["map"] < 1
    assert (part.numbers["map_50"], part.numbers["map"]) == (scores.map50, scores.map50_95)
    assert {each.name: each.map50 for each in part.classes} == scores.map50_by_class
    data.labels = [torch.zeros_like(labels) for labels in data.labels]
    missing = evaluate.report(found, data).classes[1]
    assert (missing.boxes, missing.images, missing.map50, missing.map50_95) == (0, 0, None, None)


def test_evaluate_takes_base_and_adapters_in_turn_or_together(place, tmp_path, monkeypatch):
    files = [place.adapter("a", LORA, 3), place.adapter("n", NONLINEAR, 4)]
    seen = []
    real = evaluate.predict

    def noted(model, *args, **options):
        boxes = real(model, *args, **options)
        seen.append((convpeft.active_adapters(model), boxes))
        return boxes

    monkeypatch.setattr(evaluate, "predict", noted)
    assert run(evaluate, [*place.options, "--adapter", *files, "--out", tmp_path]) == 0
    assert [active for active, _ in seen] == [(), ("a",), ("n",)]
    data, model = open_dataset(place.root / "parts", size=SIZE).test, world("n")
    convpeft.load_adapter(model, files[0])
    expected = real(model, data, place.texts, batch_size=2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen[1][1], expected, strict=True))
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(seen[0][1], expected, strict=True))
    reports = read(tmp_path / "scores.json")["reports"]
    assert list(reports) == ["(base)", "a", "n"]
    assert reports["a"]["numbers"] == evaluate.report(expected, data).numbers
    assert "| scratch | 2 | " in (tmp_path / "scores.md").read_text(encoding="utf-8")
    seen.clear()
    assert run(evaluate, [*place.options, "--adapter", *files, "--together"]) == 0
    assert [active for active, _ in seen] == [(), ("a", "n")]
