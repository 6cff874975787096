"""MVTec AD's layout: how masks become boxes, the split, and what is said where something is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.examples.generated import SIZE

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")
from examples.yolo_world.data import generate, mvtec  # noqa: E402


def test_boxes_are_the_connected_parts():
    mask = np.zeros((20, 30), np.uint8)
    mask[2:6, 3:10] = 255
    mask[10:15, 20:22] = 1
    boxes = mvtec.boxes_from_mask(mask, min_area=1)
    assert sorted(map(tuple, boxes)) == [(3, 2, 10, 6), (20, 10, 22, 15)]


def test_parts_below_the_minimum_area_give_no_box():
    mask = np.zeros((20, 20), np.uint8)
    mask[0:3, 0:3] = 255
    mask[10:14, 10:14] = 255
    assert len(mvtec.boxes_from_mask(mask, min_area=9)) == 2
    assert mvtec.boxes_from_mask(mask, min_area=10).tolist() == [[10, 10, 14, 14]]
    assert mvtec.boxes_from_mask(mask, min_area=17).shape == (0, 4)


def test_parts_that_touch_at_a_corner_are_one():
    assert mvtec.boxes_from_mask(np.eye(5, dtype=np.uint8), min_area=1).tolist() == [[0, 0, 5, 5]]


def test_an_empty_mask_gives_no_box():
    assert mvtec.boxes_from_mask(np.zeros((5, 5), np.uint8), min_area=1).shape == (0, 4)


@pytest.mark.parametrize("seed", range(5))
def test_train_and_test_are_disjoint_and_complete(root, seed):
    category = mvtec.read_category(root, "tile", train_share=0.5, seed=seed)
    train, test = ({sample.image for sample in side} for side in (category.train, category.test))
    assert not train & test
    assert train | test == {path for path in (root / "tile").rglob("*.png") if "ground_truth" not in path.parts}
    for defect in category.classes:
        assert {sample.defect for sample in category.train} >= {defect}
        assert {sample.defect for sample in category.test} >= {defect}
    assert mvtec.read_category(root, "tile", train_share=0.5, seed=seed) == category


def test_another_seed_splits_otherwise(root):
    splits = {frozenset(s.image for s in mvtec.read_category(root, "tile", seed=seed).train) for seed in range(6)}
    assert len(splits) > 1


def one_category(root: Path) -> Path:
    generate.generate(root, ["stone"], images=2, good=1, size=64)
    return root / "stone"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(mvtec.DataError, match="is not a folder"):
        mvtec.list_categories(tmp_path / "nowhere")
    with pytest.raises(mvtec.DataError, match="one level too deep"):
        mvtec.list_categories(tmp_path)
    one_category(tmp_path)
    with pytest.raises(mvtec.DataError, match=r"no category 'bottle'.*There are: stone"):
        mvtec.read_category(tmp_path, "bottle")


def test_a_category_without_defects_is_named(tmp_path):
    (tmp_path / "bottle" / "test" / "good").mkdir(parents=True)
    with pytest.raises(mvtec.DataError, match="holds no defect images"):
        mvtec.read_category(tmp_path, "bottle")


def test_a_missing_mask_is_named(tmp_path):
    (one_category(tmp_path) / "ground_truth" / "dent" / "001_mask.png").unlink()
    with pytest.raises(mvtec.DataError, match=r"001\.png has no mask: expected .*001_mask\.png"):
        mvtec.read_category(tmp_path, "stone")


def test_an_unreadable_file_is_named(tmp_path):
    broken = one_category(tmp_path) / "test" / "dent" / "000.png"
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(mvtec.DataError, match=r"000\.png cannot be decoded"):
        mvtec.load_sample(mvtec.Sample(broken), 64, 1)
    with pytest.raises(mvtec.DataError, match="is not there"):
        mvtec.load_sample(mvtec.Sample(tmp_path / "none.png"), 64, 1)


def test_a_mask_of_another_size_is_named(tmp_path):
    folder = one_category(tmp_path)
    mask = folder / "ground_truth" / "dent" / "000_mask.png"
    cv2.imwrite(str(mask), np.full((32, 64), 255, np.uint8))
    with pytest.raises(mvtec.DataError, match="is 64x32, its image is 64x64"):
        mvtec.load_sample(mvtec.Sample(folder / "test" / "dent" / "000.png", mask, "dent"), 64, 1)


def test_a_defect_image_with_only_specks_is_left_out(root):
    category = mvtec.read_category(root, "tile")
    data = mvtec.DefectImages(category.test, category.classes, size=32, min_area=SIZE * SIZE)
    assert len(data.left_out) == sum(sample.defect is not None for sample in category.test)
    assert all(sample.defect is None for sample in data.samples)
