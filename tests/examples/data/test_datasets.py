"""A data set of any form: recognised, split, with the same boxes whatever the form, or refused with what is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.examples.generated import content, write

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")
from examples.yolo_world.data import generate, mvtec, texts  # noqa: E402
from examples.yolo_world.data.augment import Augmentation  # noqa: E402
from examples.yolo_world.data.datasets import open_dataset, recognise  # noqa: E402
from examples.yolo_world.data.images import DataError, PictureImages  # noqa: E402
from examples.yolo_world.training import scores  # noqa: E402

from . import layouts  # noqa: E402

SIZE = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate.generate(tmp_path_factory.mktemp("mvtec"), ["tile", "washer"], images=4, good=2, size=SIZE)


def test_an_mvtec_category_is_what_the_demo_reads(root):
    splits = open_dataset(root / "tile", size=64, min_area=9, seed=3)
    category = mvtec.read_category(root, "tile", seed=3)
    assert (splits.form, splits.title, splits.classes) == ("mvtec", "tile", category.classes)
    for side, samples in ((splits.train, category.train), (splits.test, category.test)):
        expected = mvtec.DefectImages(samples, category.classes, size=64, min_area=9)
        assert side.samples == expected.samples
        for index in range(len(expected)):
            assert all(torch.equal(side[index][key], expected[index][key]) for key in ("img", "cls", "bboxes"))


def test_an_mvtec_root_gives_all_or_some_categories(root):
    both = open_dataset(root, size=32, min_area=9, good_limit=1)
    assert both.title == "tile+washer"
    assert {s.image.parents[2].name for s in both.train.samples} == {"tile", "washer"}
    assert "tile/train/good: 1 of 2 images used" in both.notes
    one = open_dataset(root, size=32, min_area=9, categories=["washer"])
    assert {s.image.parents[2].name for s in (*one.train.samples, *one.test.samples)} == {"washer"}
    with pytest.raises(DataError, match="is the category tile itself, not the folder of washer"):
        open_dataset(root / "tile", size=32, categories=["washer"])
    with pytest.raises(DataError, match="no category 'bottle'"):
        open_dataset(root, size=32, categories=["bottle"])
    with pytest.raises(DataError, match="there is no given split to take"):
        open_dataset(root, size=32, split="given")


def test_mvtec_defects_follow_the_class_list(root):
    classes = texts.class_texts([["mark", "stain", "scratch"], ["dent"]])
    with pytest.raises(DataError, match="'missing_part' is in no class"):
        open_dataset(root / "tile", size=32, min_area=9, classes=classes)
    splits = open_dataset(root / "tile", size=32, min_area=9, classes=classes, drop_others=True)
    assert splits.notes == ("4 images dropped, of classes that are not in the list",)
    for index, sample in enumerate(splits.train.samples):
        expected = {None: set(), "stain": {0.0}, "scratch": {0.0}, "dent": {1.0}}[sample.defect]
        assert set(splits.train[index]["cls"].flatten().tolist()) == expected


def test_the_three_forms_of_one_category_hold_the_same_boxes(root, tmp_path):
    layouts.write_coco(root, "washer", tmp_path / "coco", min_area=9)
    layouts.write_labelme(root, "washer", tmp_path / "labelme", min_area=9)
    found = []
    for path in (root / "washer", tmp_path / "coco", tmp_path / "labelme"):
        splits = open_dataset(path, size=64, min_area=9)
        boxes = {}
        for side in (splits.train, splits.test):
            for sample, (pixels, _), corners, labels in zip(
                side.samples, side.loaded, side.boxes, side.labels, strict=True
            ):
                key = (str(sample.defect), sample.image.name.rsplit("_", 1)[-1], int(pixels.sum()))
                boxes[key] = sorted(
                    (*corner, label) for corner, label in zip(corners.tolist(), labels.tolist(), strict=True)
                )
        found.append((splits.classes, boxes))
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) == 4 * 4 + 2 * 2


def test_a_coco_data_set_scores_one_with_its_own_boxes(tmp_path):
    splits = open_dataset(write(tmp_path / "all.json", content(6)), size=64)
    perfect = [
        torch.cat([t["boxes"], torch.full((len(t["boxes"]), 1), 0.9), t["labels"][:, None].float()], 1)
        for t in scores.targets_of(splits.test)
    ]
    found = scores.score(perfect, splits.test)
    assert (found.map50_95, found.map50_by_class) == (pytest.approx(1), {"coil": pytest.approx(1), "dust": pytest.approx(1)})  # fmt: skip
    swapped = [boxes.clone() for boxes in perfect]
    for boxes in swapped:
        boxes[:, 5] = 1 - boxes[:, 5]
    assert scores.score(swapped, splits.test).map50_95 == 0


def test_only_the_training_side_is_augmented(root, tmp_path):
    path = write(tmp_path / "all.json", content())
    for data in (path, root / "tile"):
        plain, changed = (open_dataset(data, size=32, min_area=9, augmentation=a) for a in (None, Augmentation()))
        assert all(torch.equal(plain.test[i]["img"], changed.test[i]["img"]) for i in range(len(plain.test)))
        assert not any(torch.equal(plain.train[i]["img"], changed.train[i]["img"]) for i in range(len(plain.train)))


def test_anything_else_is_refused_with_what_is_known(tmp_path):
    with pytest.raises(DataError, match=r"is not there\. The data must be an MVTec AD folder"):
        recognise(tmp_path / "none")
    with pytest.raises(
        DataError, match=r"holds no data set that is known here\. The data must be .*a folder of labelme JSON"
    ):
        recognise(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt is no COCO JSON file"):
        recognise(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text('{"shapes": []}')
    with pytest.raises(DataError, match=r"a\.json is one labelme file; give the folder"):
        recognise(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError, match=r"a\.json is no JSON"):
        recognise(tmp_path / "a.json")


def test_options_that_do_not_fit_the_form_are_refused(root, tmp_path):
    path = write(tmp_path / "all.json", content())
    with pytest.raises(DataError, match="is coco data, it has no categories to choose from"):
        open_dataset(path, size=32, categories=["a"])
    with pytest.raises(DataError, match="is mvtec data, its images cannot lie elsewhere"):
        open_dataset(root, size=32, images=tmp_path)


def test_the_layouts_are_written_from_the_command_line(root, tmp_path, capsys):
    assert layouts.main([str(root), "tile", str(tmp_path / "c")]) == 0
    assert layouts.main([str(root), "tile", str(tmp_path / "l"), "--form", "labelme"]) == 0
    assert layouts.main([str(root), "bottle", str(tmp_path / "b")]) == 2
    printed = capsys.readouterr()
    assert "wrote tile as labelme to" in printed.out
    assert "error: " in printed.err
    assert (recognise(tmp_path / "c"), recognise(tmp_path / "l")) == ("coco", "labelme")


def test_a_data_set_survives_being_sent_to_a_worker(tmp_path):
    import pickle

    splits = open_dataset(write(tmp_path / "all.json", content()), size=32, augmentation=Augmentation())
    copied: PictureImages = pickle.loads(pickle.dumps(splits.train))
    torch.manual_seed(0)
    first = splits.train[0]
    torch.manual_seed(0)
    assert all(torch.equal(first[key], value) for key, value in copied[0].items())
