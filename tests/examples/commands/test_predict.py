"""Predict: images are found once, and boxes come back to them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ultralytics")
import cv2
import numpy as np

import convpeft
from examples.yolo_world.commands import predict
from examples.yolo_world.data.images import DataError
from examples.yolo_world.training.model import decode, use_classes
from tests.world import world

from .place import CLASSES, LORA, NONLINEAR, SIZE, read, run


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
