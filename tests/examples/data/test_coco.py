"""COCO JSON: where images are found, what is dropped and counted, classes, the split, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.examples.generated import content, write

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")
from examples.yolo_world.data import coco, texts  # noqa: E402
from examples.yolo_world.data.datasets import open_dataset  # noqa: E402
from examples.yolo_world.data.images import Collate, DataError, Picture  # noqa: E402


def pictures(splits: Any) -> list[Picture]:
    return sorted((*splits.train.samples, *splits.test.samples), key=lambda picture: picture.name)


def test_a_file_with_images_beside_it(tmp_path):
    splits = open_dataset(write(tmp_path / "all.json", content()), size=32)
    assert (splits.form, splits.title, splits.classes, splits.notes) == ("coco", "all", ("coil", "dust"), ())
    assert (len(splits.train), len(splits.test)) == (2, 2)
    for picture, number in zip(pictures(splits), range(4), strict=True):
        expected = Picture(
            tmp_path / f"{number}.png", 40, 30, ((4, 6, 14, 14), (20.5, 10, 32.5, 25)), (1, 0), "dust", f"{number}.png"
        )
        assert picture == expected
    item = splits.train[0]
    assert item["cls"].tolist() == [[1.0], [0.0]]
    expected_boxes = torch.tensor([[9 / 40, 10 / 30, 10 / 40, 8 / 30], [26.5 / 40, 17.5 / 30, 12 / 40, 15 / 30]])
    torch.testing.assert_close(item["bboxes"], expected_boxes)
    pixels = cv2.imread(str(splits.train.samples[0].image))[..., ::-1]
    resized = cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)
    assert torch.equal(item["img"], torch.from_numpy(resized.transpose(2, 0, 1).copy()).float() / 255)


@pytest.mark.parametrize("place", [".", "images", "train2017", "images/train2017", "../images", "../train2017", "..", "../train",
                                   "../images/train"])  # fmt: skip
def test_the_images_are_found_where_they_usually_lie(tmp_path, place):
    path = tmp_path / "coils" / "annotations" / "instances_train2017.json"
    write(path, content(), path.parent / place)
    assert len(pictures(open_dataset(path, size=32))) == 4


def test_the_images_may_lie_in_a_named_folder_and_subfolders(tmp_path):
    data = content()
    for entry in data["images"]:
        entry["file_name"] = f"deep/er/{entry['file_name']}"
    path = write(tmp_path / "a" / "all.json", data, tmp_path / "far")
    data["images"][1]["file_name"] = data["images"][1]["file_name"].replace("/", "\\")
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"4 of 4 images are not there, for one deep/er/0\.png.*--image-folder"):
        open_dataset(path, size=32)
    assert len(pictures(open_dataset(path, size=32, images=tmp_path / "far"))) == 4


def test_given_train_and_val_files_are_the_sides(tmp_path):
    write(tmp_path / "annotations" / "instances_train.json", content(3), tmp_path / "train")
    other = content(2, first=3)
    other["categories"] = [{"id": 1, "name": "coil"}, {"id": 9, "name": "dust"}]
    for note in other["annotations"]:
        note["category_id"] = {5: 9, 2: 1}[note["category_id"]]
    write(tmp_path / "annotations" / "instances_val.json", other, tmp_path / "val")
    write(tmp_path / "annotations" / "captions_val.json", content(1), tmp_path / "val")
    splits = open_dataset(tmp_path, size=32)
    assert [[p.name for p in side.samples] for side in (splits.train, splits.test)] == [["0.png", "1.png", "2.png"], ["3.png", "4.png"]]  # fmt: skip
    assert {p.labels for p in pictures(splits)} == {(1, 0)}
    merged = open_dataset(tmp_path, size=32, split="hash", train_share=0.2)
    assert (len(merged.train), len(merged.test)) == (1, 4)


def test_the_layout_of_export_tools_with_one_folder_per_side(tmp_path):
    for side, first in (("train", 0), ("valid", 4), ("test", 8)):
        write(tmp_path / side / "_annotations.coco.json", content(4, first))
    splits = open_dataset(tmp_path, size=32)
    assert {p.image.parent.name for p in splits.train.samples} == {"train"}
    assert {p.image.parent.name for p in splits.test.samples} == {"valid"}


def test_merged_sides_keep_images_of_the_same_name(tmp_path):
    for side in ("train", "valid"):
        write(tmp_path / side / "_annotations.coco.json", content(4))
    assert len({picture.image for picture in pictures(open_dataset(tmp_path, size=32, split="hash"))}) == 8


def test_train_and_test_may_not_share_an_image(tmp_path):
    for side in ("train", "val"):
        write(tmp_path / "annotations" / f"{side}.json", content(), tmp_path / "images")
    with pytest.raises(DataError, match=r"train and test share 4 images, 0\.png for one"):
        open_dataset(tmp_path, size=32)


def test_files_whose_side_is_unknown_are_refused(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / "annotations" / f"{name}.json", content(), tmp_path / "images")
    with pytest.raises(DataError, match=r"several COCO files \(annotations/one\.json, annotations/two\.json\)"):
        open_dataset(tmp_path, size=32)


def test_a_given_split_that_is_not_there_is_refused(tmp_path):
    path = write(tmp_path / "all.json", content())
    with pytest.raises(DataError, match="there is no given split to take"):
        open_dataset(path, size=32, split="given")
    with pytest.raises(DataError, match="split is 'random', it must be one of auto, given, hash"):
        open_dataset(path, size=32, split="random")
    with pytest.raises(DataError, match="train_share is 1, it must lie between 0 and 1"):
        open_dataset(path, size=32, train_share=1)


def test_what_cannot_be_used_is_dropped_with_its_count(tmp_path):
    data = content()
    notes = data["annotations"]
    notes[0]["iscrowd"] = 1
    notes[1]["bbox"] = [20, 10, 0, 15]
    notes[2]["bbox"] = [-30, 6, 10, 8]
    notes[3]["bbox"] = [30, 10, 22, 15]
    notes[4]["bbox"] = [4, 6, 2, 3]
    notes[5]["bbox"] = [4, float("nan"), 2, 3]
    splits = open_dataset(write(tmp_path / "all.json", data), size=32)
    assert splits.notes[0] == (
        "all.json: 5 boxes dropped (1 crowd regions, 1 outside the image, 1 smaller than the minimum area, "
        "2 without width or height), 1 cut at the image's border"
    )
    assert "train: 2 images left out, since every box of theirs was dropped" in splits.notes
    assert [p.name for p in splits.train.left_out] == ["0.png", "2.png"]
    assert [p.boxes for p in pictures(splits)] == [((30, 10, 40, 25),), ((4, 6, 14, 14), (20.5, 10, 32.5, 25))]


@given(
    box=st.tuples(*[st.floats(-60, 60)] * 4),
    least=st.floats(0, 50),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
)
def test_a_fitted_box_lies_inside_and_loses_nothing_that_does(box, least, size):
    found, reason = coco.fit_box(box, size, least)
    if found is None:
        assert reason in (coco.DEGENERATE, coco.OUTSIDE, coco.SMALL)
        return
    assert 0 <= found[0] < found[2] <= size[0]
    assert 0 <= found[1] < found[3] <= size[1]
    assert (found[2] - found[0]) * (found[3] - found[1]) >= least
    assert found == (max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1]))
    assert (reason is None) == (max(abs(a - b) for a, b in zip(found, box, strict=True)) <= 0.25)


def test_an_image_without_annotations_is_a_faultless_one(tmp_path):
    data = content(6)
    data["annotations"] = data["annotations"][:8]
    splits = open_dataset(write(tmp_path / "all.json", data), size=32)
    bare = [picture for picture in pictures(splits) if not picture.boxes]
    assert [(picture.name, picture.defect) for picture in bare] == [("4.png", None), ("5.png", None)]
    assert {sum(not p.boxes for p in side.samples) for side in (splits.train, splits.test)} == {1}
    batch = Collate(torch.zeros(1, 2, 512))([splits.train[i] for i in range(len(splits.train))])
    assert batch["cls"].shape == (sum(len(p.boxes) for p in splits.train.samples), 1)


def test_a_box_comes_from_the_polygons_where_there_is_no_bbox(tmp_path):
    data = content()
    note = data["annotations"][0]
    del note["bbox"]
    note["segmentation"] = [[4, 6, 14, 6, 4, 10], [6, 8, 14, 14, 5, 12]]
    splits = open_dataset(write(tmp_path / "all.json", data), size=32)
    assert pictures(splits)[0].boxes[0] == (4, 6, 14, 14)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(images=[]), "is empty: its list of images has no entry"),
        (lambda d: d.update(categories=[]), "is empty: its list of categories has no entry"),
        (lambda d: d.update(annotations=[]), "is empty: it has no box that can be used"),
        (lambda d: d["annotations"][3].update(category_id=99), r"1 annotations have a category_id that is not in categories \(99\); the first is entry 3"),
        (lambda d: d["annotations"][2].update(image_id=1), r"1 annotations have a image_id that is not in images \(1\); the first is entry 2"),
        (lambda d: d["images"][1].update(id=7), "images has the id 7 more than once"),
        (lambda d: d["images"][1].update(file_name="0.png"), r"images has the file_name 0\.png more than once"),
        (lambda d: d["categories"][1].pop("name"), "entry 1 of categories has no name"),
        (lambda d: d["annotations"][1].pop("image_id"), "entry 1 of annotations has no image_id"),
        (lambda d: d["annotations"][1].pop("bbox"), "annotation 1 has neither a bbox nor polygons"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, "x", 4]), r"annotation 1: a box must be \[x, y, width, height\]"),
        (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 1: a box must be \[x, y, width, height\]"),
        (lambda d: d["images"][1].update(width=80), r"1\.png is 40x30, all\.json says 80x30\. The boxes belong to another version"),
        (lambda d: d["images"][1].update(file_name="gone.png"), r"1 of 4 images are not there, for one gone\.png"),
        (lambda d: d.pop("categories"), r"all\.json is no COCO JSON file"),
        (lambda d: [n.update(iscrowd=1) for n in d["annotations"]], r"no box that can be used \(8 boxes dropped \(8 crowd regions\)\)"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, change, text):
    path, data = write(tmp_path / "all.json", content()), copy.deepcopy(content())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match=text):
        open_dataset(path, size=32)


def test_images_that_cannot_be_read_are_named(tmp_path):
    path = write(tmp_path / "all.json", content())
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
        open_dataset(path, size=32)
    (tmp_path / "1.png").write_bytes(whole)
    splits = open_dataset(path, size=32)
    side, place = next(
        (s, i) for s in (splits.train, splits.test) for i, p in enumerate(s.samples) if p.name == "1.png"
    )
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((30, 41, 3), np.uint8))
    with pytest.raises(DataError, match=r"1\.png is 41x30, its boxes belong to 40x30"):
        side[place]


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(DataError, match="no image is left for test; at least two are needed"):
        open_dataset(write(tmp_path / "all.json", content(1)), size=32)


def test_the_class_list_gives_order_and_synonyms(tmp_path):
    path = write(tmp_path / "all.json", content())
    splits = open_dataset(path, size=32, classes=texts.class_texts([["defect"], ["dirt", "dust"], ["coil"]]))
    assert splits.classes == ("defect", "dirt", "coil")
    assert {p.labels for p in pictures(splits)} == {(1, 2)}
    assert {p.defect for p in pictures(splits)} == {"dirt"}
    assert splits.notes == ("train: no box of defect", "test: no box of defect")
    with pytest.raises(DataError, match=r"'dust' is in no class of the list \(coil\)\. Add it there.*--drop-others"):
        open_dataset(path, size=32, classes=texts.class_texts([["coil"]]))
    only = open_dataset(path, size=32, classes=texts.class_texts([["coil"]]), drop_others=True)
    assert {p.labels for p in pictures(only)} == {(0,)}
    assert only.notes == ("all.json: 4 boxes dropped (4 of classes that are not in the list)",)
    with pytest.raises(DataError, match=r"none of its classes \(coil, dust\) is in the list of class texts \(zinc\)"):
        open_dataset(path, size=32, classes=texts.class_texts([["zinc"]]))


def test_a_category_without_boxes_need_not_be_in_the_list(tmp_path):
    data = content()
    data["categories"].append({"id": 0, "name": "super"})
    splits = open_dataset(write(tmp_path / "all.json", data), size=32, classes=texts.class_texts([["dust"], ["coil"]]))
    assert splits.classes == ("dust", "coil")


@given(
    labels=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=30), share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_the_split_loses_nothing_and_depends_on_names_alone(labels, share, seed):
    everything = [
        Picture(Path(f"/x/{n}.png"), 9, 9, ((0, 0, 1, 1),) * len(found), tuple(found), None, f"{n}.png")
        for n, found in enumerate(labels)
    ]
    train, test = coco.split_pictures(everything, share, seed)
    assert sorted((*train, *test), key=lambda p: p.image) == sorted(everything, key=lambda p: p.image)
    assert train
    assert test or len(labels) == 1
    elsewhere = [dataclasses.replace(p, image=Path("/elsewhere") / p.name) for p in reversed(everything)]
    moved = coco.split_pictures(elsewhere, share, seed)
    assert [[p.name for p in side] for side in moved] == [[p.name for p in side] for side in (train, test)]


def test_a_rare_class_is_on_both_sides(tmp_path):
    data = content(30)
    data["categories"].append({"id": 1, "name": "crack"})
    for number in (3, 17):
        data["annotations"].append({"id": 900 + number, "image_id": 7 + number, "category_id": 1, "bbox": [1, 1, 9, 9]})
    path = write(tmp_path / "all.json", data)
    for seed in range(6):
        splits = open_dataset(path, size=32, seed=seed)
        assert [sum(0 in p.labels for p in side.samples) for side in (splits.train, splits.test)] == [1, 1]
    names = {frozenset(p.name for p in open_dataset(path, size=32, seed=seed).train.samples) for seed in (0, 0, 1, 2)}
    assert len(names) == 3


def test_pixels_are_kept_up_to_the_memory_there_is(tmp_path):
    path = write(tmp_path / "all.json", content(8))
    splits = open_dataset(path, size=32, memory=2 * 3 * 32 * 32)
    first = [pixels for pixels, _ in splits.train.loaded]
    assert len(splits.train.loaded.kept) == 2
    assert splits.train.loaded[0][0] is first[0]
    assert all(torch.equal(a, b[0]) for a, b in zip(first, splits.train.loaded[:], strict=True))
    assert torch.equal(splits.train.loaded[-1][0], first[-1])
    with pytest.raises(IndexError):
        splits.train.loaded[len(first)]
