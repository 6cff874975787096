"""Images in memory: the split by a hash, items and batches, and that boxes move with the pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")
from examples.yolo_world.data import mvtec, texts  # noqa: E402
from examples.yolo_world.data.augment import flip_and_relight  # noqa: E402
from examples.yolo_world.data.images import Collate  # noqa: E402
from examples.yolo_world.training import scores  # noqa: E402


@given(count=st.integers(0, 30), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_the_split_loses_nothing(count, share, seed):
    paths = [Path("root") / f"{index}.png" for index in range(count)]
    train, test = mvtec.split_by_hash(paths, share, seed, Path("root"))
    assert sorted(train + test) == sorted(paths)
    assert count < 2 or (train and test)


def test_items_and_batches_are_what_the_loss_wants(root):
    category = mvtec.read_category(root, "washer")
    data = mvtec.DefectImages(category.train, category.classes, size=64, min_area=4, augmentation=flip_and_relight)
    features = texts.load_texts(category.classes, use_clip=False).of(category.classes)
    batch = Collate(features)([data[index] for index in range(len(data))])
    count = len(batch["cls"])
    assert batch["img"].shape == (len(data), 3, 64, 64)
    assert 0 <= batch["img"].min() <= batch["img"].max() <= 1
    assert batch["cls"].shape == (count, 1)
    assert batch["bboxes"].shape == (count, 4)
    assert batch["batch_idx"].shape == (count,)
    assert batch["txt_feats"].shape == (len(data), len(category.classes), 512)
    half = batch["bboxes"][:, 2:] / 2
    assert ((batch["bboxes"][:, :2] - half) > -1e-6).all()
    assert ((batch["bboxes"][:, :2] + half) < 1 + 1e-6).all()
    for index, sample in enumerate(data.samples):
        labels = batch["cls"][batch["batch_idx"] == index]
        assert (len(labels) == 0) if sample.defect is None else (labels == category.classes.index(sample.defect)).all()


def test_augmentation_moves_boxes_with_the_pixels():
    torch.manual_seed(0)
    for key in range(30):
        image = torch.zeros(3, 32, 32)
        image[:, 4:8, 10:20] = 0.5
        box = torch.tensor([[15 / 32, 6 / 32, 10 / 32, 4 / 32]])
        turned, boxes, _ = flip_and_relight(image, box, torch.zeros(1), key)
        bright = turned.mean(0) > (turned.mean(0).min() + turned.mean(0).max()) / 2
        rows, columns = torch.where(bright)
        found = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
        torch.testing.assert_close(scores.corners(boxes, 32), found.float())
