"""The demo's quick run, from the command line into an empty folder: every step, every file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ultralytics")

from tests.examples.commands.place import run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run_demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the demo from the repository's root, as the README says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "examples.yolo_world.demo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    fewer = ("--base-steps", 4, "--steps", 3)
    places = ("--out", folder / "out", "--cache", folder / "cache")
    done = run_demo("--quick", *fewer, "--seed", 3, "--device", "cpu", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


@pytest.fixture(scope="module")
def results(finished: tuple[Path, str]) -> dict:
    return json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))


def test_the_table_has_a_row_for_each_model(finished, results):
    kinds = [(row["method"], row["trained_on"]) for row in results["rows"]]
    full = "full fine-tuning"
    assert kinds == [("base", None), ("adapter", "tile"), ("adapter", "washer"), (full, "tile"), (full, "washer")]
    table = (finished[0] / "table.md").read_text(encoding="utf-8")
    assert "GENERATED" in table
    for title in ("| base |", "| adapter: tile |", "| adapter: washer |", f"| {full}: tile |", f"| {full}: washer |"):
        assert title in table
    for row in results["rows"]:
        assert set(row["scores"]) == {"tile", "washer"}
        assert all(0 <= scores["map50_95"] <= scores["map50"] <= 1 for scores in row["scores"].values())


def test_adapters_train_at_most_five_percent_and_their_files_are_small(results):
    base, *others = results["rows"]
    for row in others:
        if row["method"] == "adapter":
            assert 0 < row["share"] <= 0.05
            assert row["file_bytes"] < base["file_bytes"] / 10
        else:
            assert 0.9999 < row["share"] < 1  # all but the 16 fixed numbers of the head's DFL


def test_swapping_files_on_a_fresh_base_gives_each_ones_boxes_bit_for_bit(results):
    assert results["swap"]["exact"] is True
    assert results["swap"]["order"] == ["tile", "washer", "None", "washer", "tile", "None"]


def test_merging_changes_no_box(results):
    for proof in results["merge"].values():
        assert proof["plain"] is True
        assert proof["same_boxes"] is True
        assert proof["float64"] < 1e-12
        assert proof["pixels"] < 1e-2
        assert proof["scores"] < 1e-4


def test_everything_promised_is_in_the_output_folder(finished, results):
    folder, printed = finished
    for name in (
        "boxes_tile.png",
        "boxes_washer.png",
        "curves.png",
        "adapters/tile.safetensors",
        "adapters/washer.safetensors",
    ):
        assert (folder / name).stat().st_size > 1000, name
    assert list((folder / "tensorboard").glob("events*"))
    assert results["seed"] == 3
    assert {"torch", "ultralytics", "python"} <= set(results["versions"])
    assert "--seed 3" in results["command"]
    assert results["plan"] in printed
    assert "seed 3" in printed
    assert "made from the class names" in printed or "CLIP" in printed


def test_tensorboard_has_each_trainings_curves(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard")).Reload()
    wanted = {f"{kind} {name}/{value}" for kind in ("adapter", "full") for name in ("tile", "washer") for value in ("loss", "map50")}  # fmt: skip
    assert wanted <= set(events.Tags()["scalars"])
    base = EventAccumulator(str(finished[0] / "tensorboard" / "base")).Reload()
    assert "base/loss" in base.Tags()["scalars"]


def test_training_moves_the_adapters(results):
    for title, curves in results["curves"].items():
        assert len(curves["losses"]) == results["options"]["steps"], title
        assert min(curves["factors"]) > 0


@pytest.mark.nightly
def test_own_data_own_weights_and_own_texts(tmp_path):
    import torch
    from safetensors.torch import save_file

    from examples.yolo_world import demo
    from examples.yolo_world.data.generate import DEFECTS, generate
    from examples.yolo_world.training.model import build_world_model

    generate(tmp_path / "parts", ["mesh", "stone"], images=3, good=1, size=96)
    torch.save({"model": build_world_model("n"), "train_args": {}}, tmp_path / "tiny-worldv2.pt")
    save_file({name: torch.randn(512) for name in DEFECTS}, tmp_path / "texts.safetensors")
    own = [
        "--data",
        tmp_path / "parts",
        "--weights",
        tmp_path / "tiny-worldv2.pt",
        "--texts",
        tmp_path / "texts.safetensors",
    ]
    places = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    assert run(demo, ["--quick", "--steps", 2, "--device", "cpu", *own, *places]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["base"] == "weights tiny-worldv2.pt"
    assert results["texts"] == "read from texts.safetensors"
    assert results["data_generated"] is False
    assert results["swap"]["exact"] is True
    assert list(results["merge"]) == ["mesh", "stone"]
    assert "GENERATED" not in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--categories", "tile", "metal"], "cannot be both in --categories and in --base-categories"),
        (["--categories", "tile", "cheese"], "no generated category cheese"),
        (["--categories", "tile", "tile"], "two different categories"),
        (["--image-size", "100"], "multiple of 32"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--data", "no/such/folder"], "is not a folder"),
        (["--texts", "no/such/file.pt"], "there is no text feature file"),
        (["--weights", "no/such/weights.pt"], "there is no weights file"),
    ],
)
def test_a_bad_option_is_said_in_words(arguments, message, tmp_path, capsys):
    from examples.yolo_world.demo import main

    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    try:
        status = main(["--quick", "--device", "cpu", "--images", "2", *folders, *arguments])
    except SystemExit as left:  # argparse leaves this way
        status = left.code
    assert status == 2
    assert message in capsys.readouterr().err
