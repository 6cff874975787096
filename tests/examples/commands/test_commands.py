"""The commands evaluate, predict, merge and compare, called as their command lines call them."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")

import cv2
import numpy as np

import convpeft
from examples.yolo_world.commands import compare, ensemble, evaluate, merge, predict, proofs, train, tune
from examples.yolo_world.commands.options import OPTIONS
from examples.yolo_world.data.datasets import open_dataset
from examples.yolo_world.data.images import DataError
from examples.yolo_world.training.model import decode, load_world_model, use_classes
from examples.yolo_world.training.scores import score, targets_of
from tests.cases import same_bits
from tests.world import moved, pictures, world

from .place import CLASSES, LORA, MIXED, NONLINEAR, SIZE, Place, make_place, run

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


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("commands"))


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


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


def test_boxes_come_back_to_the_original_image():
    found = torch.tensor([[16.0, 32, 48, 64, 0.5, 1], [-4, 0, 80, 10, 0.75, 0]])
    boxes = predict.to_boxes(found, ["dent", "stain"], size=64, width=320, height=128)
    assert boxes == [
        predict.Box("dent", 0.75, (0.0, 0.0, 320.0, 20.0)),
        predict.Box("stain", 0.5, (80.0, 64.0, 240.0, 128.0)),
    ]


def test_images_are_found_once_and_keep_their_places(tmp_path):
    for name in ("one/a.png", "one/deep/b.jpg", "two/a.jpg", "two/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    one, two = tmp_path / "one", tmp_path / "two"
    found = predict.find_sources([one, two, one / "a.png"], recursive=True)
    assert [(each.path, each.place.as_posix()) for each in found] == [
        (one / "a.png", "a.png"), (one / "deep/b.jpg", "deep/b.png"), (two / "a.jpg", "a_2.png"),
    ]  # fmt: skip
    assert [each.path for each in predict.find_sources([one])] == [one / "a.png"]
    (one / "a.png").unlink()
    with pytest.raises(DataError, match=r"holds no image .*--recursive"):
        predict.find_sources([one])


def test_predict_writes_pictures_and_the_boxes_of_each_adapter(place, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "wide.png"), pixels)
    files = [place.adapter("a", LORA, 3), place.adapter("n", NONLINEAR, 4)]
    options = place.options[2:]  # without --data: --names say what to look for
    out = tmp_path / "out"
    arguments = [
        tmp_path / "wide.png",
        *options,
        "--names",
        "stain",
        "dent",
        "--confidence",
        "0.001",
        "--adapter",
        *files,
        "--out",
        out,
    ]
    assert run(predict, arguments) == 0
    results = read(out / "predictions.json")
    (entry,) = results["images"]
    assert (results["classes"], results["models"], entry["width"], entry["height"]) == (
        ["stain", "dent"],
        ["a", "n"],
        120,
        40,
    )
    model = world("n")
    convpeft.load_adapter(model, files[1])
    use_classes(model, place.texts[:, [CLASSES.index("stain"), CLASSES.index("dent")]]).eval()
    square = torch.from_numpy(cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)[..., ::-1].copy())
    (found,) = decode(model, square.permute(2, 0, 1)[None].float() / 255, confidence=0.001)
    boxes = predict.to_boxes(found, ["stain", "dent"], size=SIZE, width=120, height=40)
    assert len(boxes) > 3
    assert [(box["label"], box["confidence"], tuple(box["xyxy"])) for box in entry["boxes"]["n"]] == [
        (box.label, box.confidence, box.xyxy) for box in boxes
    ]
    assert entry["boxes"]["a"] != entry["boxes"]["n"]
    for name in ("a", "n"):
        picture = cv2.imread(str(out / name / "wide.png"))
        assert picture.shape == pixels.shape
        assert (picture != pixels).any()
    assert run(predict, [tmp_path / "wide.png", *options, "--out", tmp_path / "none"]) == 2
    assert "which classes? Give --names" in capsys.readouterr().err
    assert run(predict, [*arguments, "--together", "--no-pictures", "--out", tmp_path / "sum"]) == 0
    assert list(read(tmp_path / "sum" / "predictions.json")["images"][0]["boxes"]) == ["a + n"]
    assert [path.name for path in (tmp_path / "sum").iterdir()] == ["predictions.json"]


def test_merge_writes_a_plain_model_that_weights_takes(place, tmp_path, capsys):
    file = place.adapter("m", MIXED, 3)
    assert run(merge, [*place.options, "--adapter", file, "--out", tmp_path]) == 0
    model = world("n")
    convpeft.load_adapter(model, file)
    expected = convpeft.merge(model)
    written = load_world_model(tmp_path / "merged.pt")
    assert same_bits(dict(written.state_dict()), dict(expected.state_dict()))
    from safetensors.torch import load_file

    assert same_bits(
        dict(sorted(load_file(tmp_path / "merged.safetensors").items())), dict(sorted(expected.state_dict().items()))
    )
    for each in (model, written):
        use_classes(each, place.texts).eval()
    torch.testing.assert_close(proofs.raw_output(written, pictures()), proofs.raw_output(model, pictures()))
    results = read(tmp_path / "merge.json")
    assert results["plain"] is True
    assert 0 < results["float64"] < proofs.EXACT
    assert "largest difference" not in capsys.readouterr().out


def test_merge_refuses_what_cannot_merge_unless_partial(place, tmp_path, capsys):
    options = [*place.options, "--adapter", place.adapter("n", NONLINEAR, 4), place.adapter("a", LORA, 3)]
    assert run(merge, [*options, "--out", tmp_path / "no"]) == 2
    assert "model.15: its GELU is not linear" in capsys.readouterr().err
    assert not list((tmp_path / "no").iterdir())
    assert run(merge, [*options, "--out", tmp_path / "part", "--partial"]) == 0
    assert read(tmp_path / "part" / "merge.json")["plain"] is False
    assert "some layers stay adapted" in capsys.readouterr().out


def test_a_merge_that_computes_something_else_is_found_and_not_written(place, tmp_path, capsys, monkeypatch):
    real = convpeft.merge

    def wrong(model, **options):
        merged = real(model, **options)
        with torch.no_grad():
            merged.get_submodule("model.12.cv2.conv").weight[0, 0, 0, 0] += 1e-3
        return merged

    monkeypatch.setattr(convpeft, "merge", wrong)
    assert run(merge, [*place.options, "--adapter", place.adapter("m", MIXED, 3), "--out", tmp_path]) == 2
    assert "from the adapted one in float64" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_operators_that_a_form_does_not_allow_are_refused():
    base = collections.Counter({"Conv": 5, "Add": 2, "Mul": 1})
    assert merge.check_operators(base, base, chains=False) == "the same 8 operators as the base"
    more = base + collections.Counter({"Conv": 3, "Add": 1})
    assert merge.check_operators(base, more, chains=True) == "the base's 8 operators and 1 Add, 3 Conv more"
    with pytest.raises(proofs.CheckError, match=r"3 Conv more, 1 Add more.*no chains, so there must be no difference"):
        merge.check_operators(base, more, chains=False)
    with pytest.raises(proofs.CheckError, match=r"1 Erf more"):
        merge.check_operators(base, more + collections.Counter({"Erf": 1}), chains=True)
    with pytest.raises(proofs.CheckError, match=r"1 Mul fewer"):
        merge.check_operators(base, collections.Counter({"Conv": 5, "Add": 2}), chains=True)


def operators(path: Path):
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.slow
def test_onnx_has_the_bases_operators_and_gives_the_adapted_models_output(place, tmp_path, capsys, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = place.adapter("m", MIXED, 3)
    options = [*place.options, "--adapter", file, "--onnx"]
    assert run(merge, [*options, "--out", tmp_path]) == 0
    assert "12 Conv" not in capsys.readouterr().out
    found = read(tmp_path / "merge.json")["onnx"]
    base = collections.Counter(found["base_operators"])
    more = operators(tmp_path / "merged.onnx") - base
    assert set(more) == {"Add", "Conv"}
    assert base - operators(tmp_path / "merged.onnx") == collections.Counter()

    model = world("n")
    convpeft.load_adapter(model, file)
    use_classes(model, place.texts).eval()
    session = onnxruntime.InferenceSession(str(tmp_path / "merged.onnx"), providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    image = pictures()[:1]
    given = torch.from_numpy(session.run(None, {name: image.numpy()})[0])
    torch.testing.assert_close(
        given, proofs.raw_output(model, image), rtol=1e-4, atol=1e-4
    )  # two float32 runtimes, pixels
    bare = proofs.compare_outputs(given, proofs.raw_output(use_classes(world("n"), place.texts), image))
    assert not bare.within(1e-4, SIZE)

    model = load_world_model(place.root / "tiny-worldv2.pt")
    convpeft.inject(model, {"rules": MIXED["rules"][:1]})
    single = convpeft.merge(use_classes(moved(model), place.texts).eval(), form="single")
    assert not merge.has_chains(single)
    ours = merge.export_onnx(merge.fused_for_export(single), image, tmp_path / "single.onnx")
    assert merge.check_operators(base, ours, chains=False).startswith("the same")
    given = merge.run_onnx(tmp_path / "single.onnx", image)
    torch.testing.assert_close(given, proofs.raw_output(model, image), rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(merge, "export_onnx", lambda *_: base)
    monkeypatch.setattr(merge, "run_onnx", lambda path, images: proofs.raw_output(single, images) + 1e-2)
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / ".base.onnx").touch()
    assert run(merge, [*options, "--out", tmp_path / "off"]) == 2
    assert "differs from the merged model by" in capsys.readouterr().err


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
