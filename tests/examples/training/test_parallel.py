"""Two processes train as one does: DDP and FSDP2 over gloo, float64, against one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")

from safetensors.torch import load_file

import convpeft
from examples.yolo_world.data.datasets import open_dataset
from examples.yolo_world.training.model import build_world_model
from examples.yolo_world.training.stream import Stream
from tests.training_toys import tiny_world

from . import distributed_runs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
NAMES = ("ddp", "ddp-accumulated", "ddp-poisoned", "fsdp")


def torchrun(*command: str) -> str:
    """Run a module in two processes, from the repository's root to its end, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*start, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_world(folder)
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict[str, dict]]:
    """Losses and tensors by number of processes and name."""
    data = str(folder / "parts")
    one = tuple(name for name in NAMES if name != "fsdp")
    try:
        distributed_runs.main([data, str(folder / "one"), *one])
    finally:
        torch.set_default_dtype(torch.float32)
    torchrun("tests.examples.training.distributed_runs", data, str(folder / "two"), *NAMES)
    found: dict[str, dict[str, dict]] = {}
    for side, names in (("one", one), ("two", NAMES)):
        found[side] = {name: json.loads((folder / side / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_one_process_result(folder, results, name):
    alone = "ddp" if name == "fsdp" else name
    one, two = results["one"][alone], results["two"][name]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9, nan_ok=True)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-9, nan_ok=True)
    assert two["guard"]["skipped"] == one["guard"]["skipped"]
    assert two["alike"] is True
    first = load_file(folder / "one" / f"{alone}.safetensors")
    second = load_file(folder / "two" / f"{name}.safetensors")
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-8, atol=1e-12, msg=key)
    start = build_world_model("n").double().state_dict()
    assert not all(torch.equal(start[key], tensor) for key, tensor in first.items() if key in start)


def test_the_halves_of_a_batch_differ_in_what_they_hold(folder):
    """Else averaging the losses of the processes would have been right without any scaling."""
    rows = Stream(open_dataset(folder / "parts", size=64).train, 0)
    counts = [len(rows[position]["cls"]) for position in range(8)]
    pairs = list(zip(counts[::2], counts[1::2], strict=True))
    assert any(first != second for first, second in pairs)
    assert any(0 in pair for pair in pairs)


def test_what_goes_wrong_in_one_process_is_skipped_by_all(results):
    for side in ("one", "two"):
        guard = results[side]["ddp-poisoned"]["guard"]
        assert (guard["skipped"], guard["returns"]) == (2, 1)
        assert "2 in a row, so back to the good adapter" in guard["messages"][-1]


def test_the_adapter_of_a_sharded_run_is_the_one_of_the_others(folder, results):
    model = build_world_model("n").double()
    for side, name in (("one", "ddp"), ("two", "fsdp")):
        convpeft.load_adapter(model, folder / side / f"{name}.adapter.safetensors", name=name)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    outputs = {}
    model.eval()
    for name in ("ddp", "fsdp", None):
        convpeft.set_active(model, name)
        with torch.no_grad():
            outputs[name] = model(
                image, txt_feats=torch.randn(1, 4, 512, generator=torch.Generator().manual_seed(0)).double()
            )[0]
    torch.testing.assert_close(outputs["fsdp"], outputs["ddp"], rtol=1e-8, atol=1e-10)
    assert not torch.allclose(outputs["ddp"], outputs[None], rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_the_command_runs_under_torchrun(folder):
    spec = folder / "spec.yaml"
    spec.write_text("rules: [{match: 'model.12.cv2.conv', kind: moe_rep_mona, rank: 4}]", encoding="utf-8")
    common = [
        "examples.yolo_world",
        "train",
        "--data",
        folder / "parts",
        "--weights",
        folder / "tiny-worldv2.pt",
        "--spec",
        spec,
    ]
    common += ["--image-size", 64, "--threads", 1, "--steps", 3, "--evaluations", 1, "--batch-size", 1]
    said = torchrun(*map(str, [*common, "--out", folder / "torchrun"]))
    assert said.count("best mAP50-95") == 1, "one process speaks"
    log = json.loads((folder / "torchrun" / "log.json").read_text(encoding="utf-8"))
    assert log["processes"] == 2
    assert len(log["losses"]) == 3
    model = build_world_model("n")
    convpeft.load_adapter(model, folder / "torchrun" / "last.safetensors")
    assert (folder / "torchrun" / "checkpoint.safetensors").is_file()


@pytest.mark.nightly
def test_one_process_trains_a_missing_base_while_the_others_wait(tmp_path):
    small = ["--image-size", 64, "--images", 2, "--base-steps", 2, "--batch-size", 1, "--steps", 1, "--evaluations", 1]
    command = ["examples.yolo_world", "train", *small, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    said = torchrun(*map(str, command))
    assert said.count("one process trains it") == 1
    assert len(list((tmp_path / "cache").glob("base-n-*.pt"))) == 1
    assert json.loads((tmp_path / "run" / "log.json").read_text(encoding="utf-8"))["processes"] == 2
