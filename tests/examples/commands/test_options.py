"""Options: spelled alike in every command, and refused in words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ultralytics")
from examples.yolo_world.commands import compare, ensemble, evaluate, merge, predict, train, tune
from examples.yolo_world.commands.options import OPTIONS
from examples.yolo_world.training.model import load_world_model

from .place import CLASSES, LORA, read, run

COMMANDS = {
    "evaluate": evaluate,
    "predict": predict,
    "merge": merge,
    "tune": tune,
    "compare": compare,
    "ensemble": ensemble,
}


SHARED = (
    "data",
    "categories",
    "classes",
    "image_size",
    "weights",
    "scale",
    "texts",
    "batch_size",
    "device",
    "seed",
    "out",
    "cache",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_shared_options_as_every_command_does(name, capsys):
    assert run(COMMANDS[name], ["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"python -m examples.yolo_world {name}" in shown
    for option in SHARED:
        assert f"--{option.replace('_', '-')}" in shown
    for option in ("data", "classes", "texts"):
        assert " ".join(OPTIONS[option]["help"].split())[:40] in shown
    if name in ("tune", "compare"):
        assert "--epochs" in shown
        assert "--resume" not in shown
    else:
        assert "--adapter" in shown


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["--image-size", "100"], "multiple of 32"),
        ("evaluate", ["--data", "no/such"], "no/such is not there"),
        ("evaluate", ["--adapter", "no/such.safetensors"], "no/such.safetensors"),
        ("predict", ["no/such.png"], "no/such.png is not there"),
        ("predict", ["setup.cfg"], "setup.cfg is no image"),
        ("predict", ["convpeft"], "convpeft holds no image"),
        ("predict", ["x.png", "--confidence", "0"], "--confidence must lie between 0 and 1"),
        ("merge", [], "--adapter says which files to merge"),
        ("merge", ["--adapter", "a", "--tolerance", "nan"], "--tolerance must not be negative"),
        ("compare", ["--specs", "no/such.yaml"], "no/such.yaml"),
        ("compare", ["--full-lr", "0"], "--full-lr must be above 0"),
        ("compare", ["--specs", "a/x.yaml", "b/x.yaml"], "x names two rows"),
        ("compare", ["--resume"], "--resume belongs to train"),
        ("compare", ["--steps", "0"], "--steps must be at least 1"),
        ("compare", ["--step", "3"], "unrecognized arguments: --step"),
        ("tune", ["--lr", "0.1"], "--lr belongs to train"),
        ("tune", ["--lr-range", "0.1", "0.01"], "--lr-range wants two rates above 0"),
        ("tune", ["--ranks", "0"], "--ranks must be above 0"),
        ("tune", ["--positions", "neck.nose"], "no rule of rep_mona.yaml is at 'neck.nose'. Its rules name neck"),
    ],
)  # fmt: skip
def test_a_bad_option_is_said_in_words(name, arguments, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    options = [arguments[0], *place.options, *arguments[1:]] if name == "predict" else [*place.options, *arguments]
    assert run(COMMANDS[name], [*options, "--out", tmp_path / "out"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_command_runs_as_a_module(place):
    """Once in a process of its own: the module's name as the README writes it."""
    command = [sys.executable, "-m", "examples.yolo_world", "evaluate", *place.options, "--data", "no/such"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=dict(os.environ), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no/such is not there")


def test_train_takes_weights_made_for_another_number_of_classes(place, tmp_path):
    assert load_world_model(place.root / "tiny-worldv2.pt").model[-1].nc != len(CLASSES)
    assert (
        run(
            train,
            [
                *place.options,
                "--steps",
                "1",
                "--evaluations",
                "1",
                "--spec",
                place.spec("narrow", LORA),
                "--out",
                tmp_path,
            ],
        )
        == 0
    )
    assert read(tmp_path / "log.json")["classes"] == list(CLASSES)
