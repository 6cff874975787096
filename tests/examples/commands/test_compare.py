"""Compare: every row is trained alike, kept when finished, and taken up where it was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ultralytics")

import cv2

from examples.yolo_world.commands import compare
from examples.yolo_world.training import trainer
from tests.world import world

from .place import LORA, NONLINEAR, Place, read, run


def compare_options(place: Place) -> list[object]:
    specs = [place.spec("narrow", LORA), place.spec("bent", NONLINEAR)]
    training = ["--steps", "3", "--evaluations", "1", "--checkpoint-every", "1", "--lr", "0.01"]
    return [*place.options, *training, "--specs", *specs]


def stop_at(monkeypatch, name: str, step: int) -> None:
    """Have the training in a row's folder be cut off before a step."""
    real = trainer.Trainer.take_step

    def take_step(self, rows):
        if self.step == step and name in json.dumps(self.note):
            raise KeyboardInterrupt
        real(self, rows)

    monkeypatch.setattr(trainer.Trainer, "take_step", take_step)


@pytest.mark.nightly
@pytest.mark.slow
def test_compare_keeps_finished_rows_and_goes_on_with_the_one_that_was_cut_off(place, tmp_path, monkeypatch, capsys):
    options = compare_options(place)
    with monkeypatch.context() as patch:
        stop_at(patch, "bottleneck", 2)
        with pytest.raises(KeyboardInterrupt):
            run(compare, [*options, "--out", tmp_path / "cut"])
    rows = tmp_path / "cut" / "rows"
    assert [path.parent.name for path in rows.glob("*/row.json")] == ["narrow"]
    assert (rows / "bent" / "checkpoint.safetensors").is_file()
    kept = (rows / "narrow" / "row.json").read_bytes(), (rows / "narrow" / "last.safetensors").stat().st_mtime_ns
    assert run(compare, [*options, "--out", tmp_path / "cut"]) == 0
    assert "narrow: mAP50" in capsys.readouterr().out
    assert kept == (
        (rows / "narrow" / "row.json").read_bytes(),
        (rows / "narrow" / "last.safetensors").stat().st_mtime_ns,
    )
    assert "resumed from" in (rows / "bent" / "log.txt").read_text(encoding="utf-8")
    assert run(compare, [*options, "--out", tmp_path / "whole"]) == 0
    for name in ("narrow", "bent", "head", "full"):
        first, second = (read(tmp_path / which / "rows" / name / "row.json") for which in ("cut", "whole"))
        assert first.pop("seconds_per_step") > 0
        assert second.pop("seconds_per_step") > 0
        assert first == second
    check_comparison(tmp_path / "whole")

    assert run(compare, [*options, "--lr", "0.02", "--out", tmp_path / "whole"]) == 2
    assert "results of other options: --lr 0.01 then, 0.02 now" in capsys.readouterr().err
    place.spec("narrow", {**LORA, "norm": "adapt"})
    assert run(compare, [*options, "--out", tmp_path / "whole"]) == 2
    assert "was made with another spec than the file holds now" in capsys.readouterr().err
    place.spec("narrow", LORA)


def check_comparison(folder: Path) -> None:
    """Check what a finished comparison left behind."""
    results = read(folder / "compare.json")
    rows = {row["name"]: row for row in results["rows"]}
    assert [row["name"] for row in results["rows"]] == ["bent", "narrow", "head", "full"]
    model = world("n")  # its fixed sum, dfl, does not train
    assert rows["full"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = [p for key in ("cv2", "cv3") for p in getattr(model.model[-1], key).parameters()]
    assert rows["head"]["trainable"] == sum(p.numel() for p in head)
    assert all(rows[name]["reloads"] for name in ("bent", "narrow", "head"))
    assert rows["bent"]["merge"].startswith("1 kept; kept because: its GELU is not linear")
    assert rows["narrow"]["merge"].startswith("whole: ")
    assert [row["name"] for row in results["rows"] if row["spec"] is None] == ["full"]
    assert {row["steps"] for row in results["rows"]} == {3}
    table = (folder / "table.md").read_text(encoding="utf-8")
    for title in ("| base, untouched | 0 |", "| bent |", "| narrow |", "| head only |", "| full fine-tuning |"):
        assert title in table
    height, width = cv2.imread(str(folder / "compare.png")).shape[:2]
    assert (height > 300, width > 600) == (True, True)


def test_compare_plans_every_spec_before_it_trains_any(place, tmp_path, capsys):
    wrong = place.spec("wrong", {"rules": [{"match": "model.99.conv", "kind": "lora"}]})
    assert run(compare, [*place.options, "--steps", "1", "--specs", wrong, "--out", tmp_path]) == 2
    assert "spec wrong does not fit this model, and nothing was trained" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_the_specs_that_come_along_are_the_default():
    names = {path.stem for path in compare.parse([]).specs}
    assert {"phase2_lora", "phase2_hybrid_aggressive", "phase2_step5_moe_mona_v2", "rep_mona"} <= names
    assert len(names) >= 12
