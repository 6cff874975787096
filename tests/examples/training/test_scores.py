"""Mean average precision: perfect boxes score one, none score nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")
from examples.yolo_world.data import mvtec  # noqa: E402
from examples.yolo_world.training import scores  # noqa: E402


def test_perfect_boxes_score_one(root):
    category = mvtec.read_category(root, "tile")
    data = mvtec.DefectImages(category.test, category.classes, size=64, min_area=4)
    perfect = [
        torch.cat([t["boxes"], torch.full((len(t["boxes"]), 1), 0.9), t["labels"][:, None].float()], 1)
        for t in scores.targets_of(data)
    ]
    assert scores.score(perfect, data).map50_95 == pytest.approx(1)
    nothing = scores.score([torch.zeros(0, 6) for _ in data.samples], data)
    assert (nothing.map50, nothing.map50_95) == (0, 0)
