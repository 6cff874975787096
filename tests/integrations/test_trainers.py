"""ultralytics' own trainer builds a new model: refused while adapters would be left behind, and untouched otherwise."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("ultralytics")

import convpeft
from convpeft import HostError
from convpeft.hosts.wrappers import inside
from tests.detector import Untouched

SPEC = {"rules": [{"match": "model.2.**", "kind": "lora", "rank": 2, "only": "Conv2d"}]}
TEXT = r"builds a new model, which has none of the adapters .*get_model\(\) returns the adapted model.*The model is unchanged"


@pytest.fixture
def yolo(monkeypatch):
    """Return a small YOLO with adapters, in a world without a network."""
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    made = YOLO("yolov8n.yaml")
    convpeft.inject(made.model, SPEC)
    return made


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Return arguments of a training run on two images that takes seconds."""
    monkeypatch.chdir(tmp_path)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    generator = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / f"images/{number}.png")
        (tmp_path / f"labels/{number}.txt").write_text("0 .5 .5 .4 .4\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: a}}\n")
    return {
        "data": str(data), "epochs": 1, "imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "val": False,
        "verbose": False, "amp": False, "project": str(tmp_path), "optimizer": "SGD", "warmup_epochs": 0,
    }  # fmt: skip


def test_train_and_tune_are_refused_before_anything_is_built(yolo):
    before = Untouched(yolo.model)
    for call in (yolo.train, lambda: yolo.train(data="none.yaml"), lambda: yolo.tune(data="none.yaml")):
        with pytest.raises(HostError, match=rf"YOLO\.(train|tune)\(\) {TEXT}"):
            call()
    convpeft.set_active(yolo.model, None)
    with pytest.raises(HostError, match=TEXT):
        yolo.train(data="none.yaml")
    assert yolo.trainer is None
    before = before.model
    assert before is yolo.model


def test_a_model_read_from_a_checkpoint_is_refused_in_a_new_process(yolo, tmp_path):
    path = tmp_path / "adapted.pt"
    torch.save({"model": yolo.model, "train_args": {}}, path)
    script = (
        "import sys, torch; from ultralytics import YOLO\n"
        "made = YOLO('yolov8n.yaml'); made.model = torch.load(sys.argv[1], weights_only=False)['model']\n"
        "made.train(data='none.yaml')"
    )
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=300)
    assert "HostError: YOLO.train() builds a new model" in run.stderr


def test_a_trainer_that_takes_the_adapted_model_trains_the_adapters(yolo, arguments):
    from ultralytics.models.yolo.detect import DetectionTrainer

    adapted = yolo.model

    class Mine(DetectionTrainer):
        def get_model(self, cfg=None, weights=None, verbose=True):
            adapted.nc, adapted.names = 80, {number: str(number) for number in range(80)}
            return adapted

        def final_eval(self):
            """Validates a fused copy, which an adapted model refuses."""

    own = len(yolo.callbacks["on_pretrain_routine_end"])
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    yolo.train(trainer=Mine, **arguments)
    assert inside(yolo.trainer.model) is adapted
    moved = {key for key, value in adapted.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert len(yolo.callbacks["on_pretrain_routine_end"]) == own


def test_a_trainer_that_builds_its_own_model_is_refused_before_it_trains(yolo, arguments):
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Theirs(DetectionTrainer):
        def optimizer_step(self):
            raise AssertionError("it trains")

    own = len(yolo.callbacks["on_pretrain_routine_end"])
    with pytest.raises(HostError, match=rf"Theirs\.get_model\(\) {TEXT}"):
        yolo.train(trainer=Theirs, **arguments)
    assert convpeft.active_adapters(yolo.model) == ("default",)
    assert len(yolo.callbacks["on_pretrain_routine_end"]) == own


def test_everything_else_goes_on_working(yolo):
    assert yolo.model.yaml["nc"] == 80
    assert yolo.names[0] == "0"
    assert convpeft.active_adapters(copy.deepcopy(yolo.model)) == ("default",)
    buffer = io.BytesIO()
    torch.save(yolo.model, buffer)
    yolo.model = convpeft.merge(yolo.model)
    assert len(yolo.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)) == 1


def test_a_model_without_adapters_trains_as_ever(yolo, arguments):
    convpeft.eject(yolo.model)
    yolo.train(**arguments)
    assert isinstance(yolo.trainer.model, nn.Module)
