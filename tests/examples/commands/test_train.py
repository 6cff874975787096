"""The command ``train``: what it writes, how it goes on after a kill, and what it says when something is off."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState

import convpeft
from examples.yolo_world.commands import train
from examples.yolo_world.commands.session import load_data
from examples.yolo_world.training.checkpoint import load_checkpoint
from examples.yolo_world.training.model import copy_model, load_world_model
from examples.yolo_world.training.schedule import FLOOR
from examples.yolo_world.training.scores import predict
from tests.training_toys import same, tiny_world

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
SPEC = """
rules:
  - {match: "model.{12,15}.cv2.conv", kind: lora, rank: 2, dropout: 0.3, lr_mult: 2.0}
  - {match: "model.18.cv2.conv", kind: rep_mona, rank: 2, kernel_sizes: [3]}
unfreeze:
  - {match: "model.22.cv3.*.2", lr_mult: 0.5}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("world")
    data, weights = tiny_world(folder)
    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    common = [
        "--data",
        data,
        "--weights",
        weights,
        "--spec",
        folder / "spec.yaml",
        "--image-size",
        64,
        "--batch-size",
        2,
    ]
    common += ["--device", "cpu", "--threads", 1, "--cache", folder / "cache"]
    return SimpleNamespace(folder=folder, weights=weights, common=[str(part) for part in common])


def run(world: SimpleNamespace, out: Path, *options: object, expected: int = 0) -> dict:
    """Run the command in this process and return its log."""
    status = train.main([*world.common, "--out", str(out), *map(str, options)])
    assert status == expected
    return json.loads((out / "log.json").read_text(encoding="utf-8")) if status == 0 else {}


LONG = ("--steps", 8, "--accumulation", 2, "--evaluations", 1, "--checkpoint-every", 2, "--ema", 0.9, "--lr", 0.01)


@pytest.fixture(scope="module")
def unbroken(world) -> Path:
    run(world, world.folder / "unbroken", *LONG)
    return world.folder / "unbroken"


def test_everything_promised_is_in_the_output_folder(world, unbroken, capsys):
    log = json.loads((unbroken / "log.json").read_text(encoding="utf-8"))
    assert len(log["losses"]) == len(log["norms"]) == log["steps"] == 8
    assert log["classes"] == ["dent", "missing_part", "scratch", "stain"]
    assert log["scores"][0]["step"] == 8
    assert {"torch", "ultralytics"} <= set(log["versions"])
    assert log["guard"] == {"skipped": 0, "returns": 0, "rate": 1.0, "messages": []}
    rates = {group["name"]: (group["lr_mult"], group["lr"]) for group in log["groups"]}
    assert rates["mesh.lora x2"] == (2.0, 0.02)
    assert rates["mesh.rep_mona"] == (1.0, 0.01)
    assert rates["mesh.unfrozen x0.5"] == (0.5, 0.005)
    for name in ("last", "best", "checkpoint"):
        assert (unbroken / f"{name}.safetensors").stat().st_size > 1000


def test_tensorboard_has_the_rate_of_each_group(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unbroken / "tensorboard")).Reload()
    assert {"loss", "gradient norm", "guard/skipped", "map50", "rate/mesh.lora x2"} <= set(events.Tags()["scalars"])
    log = json.loads((unbroken / "log.json").read_text(encoding="utf-8"))
    found = [event.value for event in events.Scalars("rate/mesh.lora x2")]
    assert found == pytest.approx([0.02 * factor for factor in log["factors"]], rel=1e-6)
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(log["losses"], rel=1e-6)


def test_the_saved_adapter_is_the_average_and_loads_on_a_fresh_base(world, unbroken):
    args = train.parse([*world.common, "--out", str(unbroken)])
    data = load_data(args)
    model = load_world_model(world.weights)
    bare = copy_model(model)
    file = convpeft.load_adapter(model, unbroken / "last.safetensors")
    assert file.name == "mesh"
    content = load_checkpoint(unbroken / train.CHECKPOINT)
    averages, live = content["average"]["averages"], content["tensors"]
    shown = model.state_dict()
    trained = [key for key in averages if ".convpeft.mesh." in key or (".cv3." in key and key.endswith("2.weight"))]
    assert len(trained) >= 8
    assert all(torch.equal(shown[key], averages[key]) for key in trained)
    assert not all(torch.equal(shown[key], live[key]) for key in trained)
    boxes, others = predict(model, data.test, data.texts), predict(bare, data.test, data.texts)
    assert not all(torch.equal(first, second) for first, second in zip(boxes, others, strict=True))


def test_a_killed_run_goes_on_to_the_very_same_curve(world, unbroken):
    out = world.folder / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "examples.yolo_world", "train", *world.common, "--out", str(out), *map(str, LONG)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (out / train.CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    assert not (out / "log.json").exists()
    assert 2 <= load_checkpoint(out / train.CHECKPOINT)["step"] < 8
    log = run(world, out, *LONG, "--resume")
    expected = json.loads((unbroken / "log.json").read_text(encoding="utf-8"))
    for key in ("losses", "norms", "factors", "scores", "best"):
        assert log[key] == expected[key], key
    first, second = (load_checkpoint(folder / train.CHECKPOINT) for folder in (unbroken, out))
    assert same(first["tensors"], second["tensors"])
    assert same(first["average"]["averages"], second["average"]["averages"])
    for number, entry in first["optimizer"]["state"].items():
        assert same(entry, second["optimizer"]["state"][number])
    for name in ("last", "best"):
        assert (out / f"{name}.safetensors").read_bytes() == (unbroken / f"{name}.safetensors").read_bytes()


def test_going_on_past_the_end_stays_at_the_floor(world, unbroken, tmp_path):
    longer = run(world, tmp_path, *LONG, "--resume", unbroken, "--steps", 10)
    shorter = run(world, tmp_path, *LONG, "--resume", unbroken, "--steps", 4)
    assert len(longer["losses"]) == 10
    assert all(FLOOR <= factor <= 1 for factor in longer["factors"])
    assert len(shorter["losses"]) == 8
    assert shorter["losses"] == longer["losses"][:8]


def test_weights_only_takes_the_adapter_and_nothing_else(world, unbroken, tmp_path, capsys):
    log = run(world, tmp_path, "--steps", 2, "--evaluations", 1, "--resume", unbroken, "--weights-only")
    assert log["factors"][0] == FLOOR
    assert len(log["losses"]) == 2
    assert "its training starts anew" in capsys.readouterr().out
    fresh = run(world, tmp_path / "fresh", "--steps", 2, "--evaluations", 1)
    assert log["losses"][0] != fresh["losses"][0]
    assert convpeft.inspect_adapter(tmp_path / "last.safetensors").layers.keys() == convpeft.inspect_adapter(unbroken / "last.safetensors").layers.keys()  # fmt: skip


def test_training_stops_early_without_progress(world, tmp_path, capsys):
    log = run(world, tmp_path, "--steps", 8, "--evaluations", 8, "--patience", 2)
    assert log["stopped_early"] is True
    assert log["steps"] == log["best"]["step"] + 2 < 8
    assert "stopped early" in capsys.readouterr().out


def test_an_explosion_trains_to_the_end_with_a_finite_loss(world, tmp_path, capsys):
    options = ("--steps", 25, "--evaluations", 1, "--lr", 1e20, "--guard-lower", 1e-8)
    log = run(world, tmp_path, *options)
    assert len(log["losses"]) == 25
    assert log["guard"]["returns"] >= 1
    assert None in log["losses"]
    assert log["losses"][-1] is not None
    assert math.isfinite(log["losses"][-1])
    assert log["losses"][-1] < 2 * log["losses"][0]
    assert "back to the good adapter of step" in capsys.readouterr().out
    with open(tmp_path / "last.safetensors", "rb") as file:
        from safetensors.torch import load

        assert all(tensor.isfinite().all() for tensor in load(file.read()).values())


@pytest.fixture
def fresh_accelerate():
    """Let a test choose another precision: accelerate keeps one for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_trains(world, tmp_path, unbroken, fresh_accelerate):
    log = run(world, tmp_path, *LONG, "--precision", "bf16", "--steps", 2)
    exact = json.loads((unbroken / "log.json").read_text(encoding="utf-8"))
    assert log["losses"][0] != exact["losses"][0]
    assert log["losses"][0] == pytest.approx(exact["losses"][0], rel=0.05)  # bfloat16 has 8 bits: 0.4 % each operation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "no/such/run"], "there is no checkpoint"),
        (["--resume", "UNBROKEN", "--spec", "OTHER"], "was trained with another spec"),
        (["--resume", "UNBROKEN", "--weights", "OTHER"], "was trained with another base"),
        (["--weights-only"], "--weights-only wants --resume RUN"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--ema", "1"], "--ema must lie between 0 and 1"),
        (["--guard-lower", "1"], "--guard-lower must lie between 0 and 1"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--augment-flip-x", "2"], "flip_x is 2, it must lie between 0 and 1"),
        (["--spec", "no/such/spec.yaml"], "no/such/spec.yaml"),
    ],
)
def test_a_bad_option_is_said_in_words(world, unbroken, arguments, message, tmp_path, capsys):
    (tmp_path / "other.yaml").write_text("rules: [{match: model.12.cv2.conv, kind: lora, rank: 2}]", encoding="utf-8")
    if arguments[-2:] == ["--weights", "OTHER"]:
        from examples.yolo_world.training.model import build_world_model

        torch.save({"model": build_world_model("n", seed=5), "train_args": {}}, tmp_path / "other.pt")
    other = tmp_path / ("other.pt" if "--weights" in arguments else "other.yaml")
    arguments = [{"UNBROKEN": str(unbroken), "OTHER": str(other)}.get(part, part) for part in arguments]
    try:
        status = train.main([*world.common, *map(str, LONG), "--out", str(tmp_path / "out"), *arguments])
    except SystemExit as left:  # argparse leaves this way
        status = left.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_options_are_spelled_as_in_the_other_commands(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    for name in ("data", "categories", "classes", "weights", "scale", "texts", "spec", "image-size", "batch-size", "device",
                 "precision", "seed", "out", "cache"):  # fmt: skip
        assert f"--{name}" in shown
