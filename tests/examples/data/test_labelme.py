"""labelme to COCO: shapes, sizes, classes and errors, on files in labelme's form."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")

from examples.yolo_world.data import coco, generate, labelme, mvtec  # noqa: E402
from examples.yolo_world.data.datasets import open_dataset  # noqa: E402
from examples.yolo_world.data.images import DataError, image_size  # noqa: E402
from examples.yolo_world.data.texts import class_texts  # noqa: E402

from . import layouts  # noqa: E402


def shape(label: str, kind: str | None, *points: tuple[float, float], group: int | None = None) -> dict[str, Any]:
    found = {"label": label, "points": [list(point) for point in points], "group_id": group, "flags": {}}
    return found if kind is None else {**found, "shape_type": kind}


def write(folder: Path, name: str, *shapes: dict[str, Any], size: tuple[int, int] = (40, 30), **changes: Any) -> Path:
    """Write an image of a (width, height) and its labelme file; a change to None takes the entry out."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    cv2.imwrite(str(folder / f"{name}.png"), pixels)
    content = {
        "version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": f"{name}.png", "imageData": None,
        "imageHeight": size[1], "imageWidth": size[0], **changes,
    }  # fmt: skip
    content = {key: value for key, value in content.items() if value is not None or key == "imageData"}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / f"{name}.json"


def converted(folder: Path, **options: Any) -> labelme.Converted:
    return labelme.convert(labelme.read_folder(folder), folder, **options)


def test_rectangles_and_polygons_become_boxes_and_segmentations(tmp_path):
    write(
        tmp_path, "a", shape("coil", "rectangle", (20, 12), (4.5, 2)), shape("dust", "polygon", (1, 1), (9, 1), (1, 7))
    )
    write(tmp_path, "b", shape("coil", None, (0, 0), (10, 0), (10, 5), (0, 5)))
    write(tmp_path, "c")
    found = converted(tmp_path)
    assert found.content["images"] == [
        {"id": number, "file_name": f"{name}.png", "width": 40, "height": 30} for number, name in ((1, "a"), (2, "b"), (3, "c"))
    ]  # fmt: skip
    assert [(c["id"], c["name"]) for c in found.content["categories"]] == [(1, "coil"), (2, "dust")]
    assert found.content["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4.5, 2.0, 15.5, 10.0], "area": 155.0, "iscrowd": 0,
         "segmentation": [[4.5, 2.0, 20.0, 2.0, 20.0, 12.0, 4.5, 12.0]]},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1.0, 1.0, 8.0, 6.0], "area": 24.0, "iscrowd": 0,
         "segmentation": [[1.0, 1.0, 9.0, 1.0, 1.0, 7.0]]},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [0.0, 0.0, 10.0, 5.0], "area": 50.0, "iscrowd": 0,
         "segmentation": [[0.0, 0.0, 10.0, 0.0, 10.0, 5.0, 0.0, 5.0]]},
    ]  # fmt: skip
    assert found.dropped == {}


def test_pycocotools_reads_the_result_and_agrees_on_the_area(tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco")
    points = [(3.0, 2.0), (33.0, 5.0), (30.0, 25.0), (12.0, 28.0)]
    write(tmp_path / "in", "a", shape("coil", "polygon", *points), shape("coil", "rectangle", (2, 2), (22, 12)))
    assert labelme.main([str(tmp_path / "in"), str(tmp_path / "out" / "all.json")]) == 0
    dataset = pycocotools.COCO(str(tmp_path / "out" / "all.json"))
    for note in dataset.loadAnns(dataset.getAnnIds()):
        assert int(dataset.annToMask(note).sum()) == pytest.approx(note["area"], rel=0.05)  # pixels against area
    assert dataset.loadImgs([1])[0]["file_name"] == "../in/a.png"


def test_shapes_of_one_group_are_one_object(tmp_path):
    square = ((0, 0), (4, 0), (4, 4), (0, 4))
    write(
        tmp_path, "a", shape("coil", "polygon", *square, group=1), shape("coil", "rectangle", (10, 10), (12, 11), group=1),
        shape("coil", "rectangle", (20, 20), (22, 22), group=2), shape("dust", "rectangle", (20, 20), (22, 22), group=1),
    )  # fmt: skip
    notes = converted(tmp_path).content["annotations"]
    assert [(note["bbox"], note["area"], len(note["segmentation"])) for note in notes] == [
        ([0, 0, 12, 11], 18, 2), ([20, 20, 2, 2], 4, 1), ([20, 20, 2, 2], 4, 1),
    ]  # fmt: skip


def test_what_cannot_be_used_is_counted(tmp_path):
    write(
        tmp_path, "a", shape("coil", "rectangle", (5, 5), (10, 10)), shape("coil", "circle", (5, 5), (9, 9)),
        shape("coil", "rectangle", (5, 5), (5, 9)), shape("coil", "polygon", (1, 1), (5, 5)),
        shape("coil", "rectangle", (50, 5), (60, 9)), shape("coil", "rectangle", (-5, 5), (5, 9)),
        shape("coil", "polygon", (1, 1), (3, 3), (5, 5)), shape("coil", "polygon", (1, 1), (float("nan"), 3), (5, 9)),
    )  # fmt: skip
    write(tmp_path, "b", shape("coil", "point", (5, 5)))
    found = converted(tmp_path)
    assert found.dropped == {
        "shapes of the kind circle": 1, "shapes of the kind point": 1, coco.DEGENERATE: 4, coco.OUTSIDE: 1, coco.CUT: 1,
    }  # fmt: skip
    assert [note["bbox"] for note in found.content["annotations"]] == [[5, 5, 5, 5], [0, 5, 5, 4]]
    assert [path.name for path in found.left_out] == ["b.png"]
    assert [image["file_name"] for image in found.content["images"]] == ["a.png"]


def test_the_size_comes_from_the_image_where_the_file_does_not_say_it(tmp_path):
    path = write(tmp_path, "a", shape("coil", "rectangle", (5, 5), (10, 10)), imageHeight=None, imageWidth=None)
    assert "imageHeight" not in json.loads(path.read_text())
    assert converted(tmp_path).content["images"][0] == {"id": 1, "file_name": "a.png", "width": 40, "height": 30}


def test_another_size_than_the_images_is_refused(tmp_path):
    write(tmp_path, "a", shape("coil", "rectangle", (5, 5), (10, 10)), imageHeight=60)
    with pytest.raises(DataError, match=r"a\.png is 40x30, a\.json says 40x60\..*another version"):
        labelme.read_folder(tmp_path)


def test_an_image_turned_by_its_exif_entry_has_the_size_it_is_shown_with(tmp_path):
    image = pytest.importorskip("PIL.Image").new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (30, 40)
    assert cv2.imread(str(tmp_path / "a.jpg")).shape[:2] == (40, 30)


@pytest.mark.parametrize("named", ["a.png", "..\\photos\\a.png", "C:\\photos\\a.png", "/gone/a.png", None])
def test_the_image_is_found_beside_the_file(tmp_path, named):
    write(tmp_path, "a", shape("coil", "rectangle", (5, 5), (10, 10)), imagePath=named)
    assert labelme.read_folder(tmp_path)[0].image.resolve() == (tmp_path / "a.png").resolve()


def test_an_image_elsewhere_is_found_where_the_file_says(tmp_path):
    write(tmp_path / "json", "a", shape("coil", "rectangle", (5, 5), (10, 10)), imagePath="..\\photos\\b.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "json" / "a.png").rename(tmp_path / "photos" / "b.png")
    assert converted(tmp_path / "json").content["images"][0]["file_name"] == "../photos/b.png"


def test_the_class_list_gives_order_names_and_synonyms(tmp_path):
    write(tmp_path, "a", *(shape(label, "rectangle", (5, 5), (10, 10)) for label in ("spool", "dust ", "coil")))
    found = converted(tmp_path, classes=class_texts([["dust"], ["coil", "spool"], ["defect"]]))
    assert [c["name"] for c in found.content["categories"]] == ["dust", "coil", "defect"]
    assert [note["category_id"] for note in found.content["annotations"]] == [2, 1, 2]


def test_labels_that_are_in_no_class_are_refused_or_counted(tmp_path):
    write(tmp_path, "a", *(shape(label, "rectangle", (5, 5), (10, 10)) for label in ("coil", "dsut", "coil")))
    classes = class_texts([["dust"], ["coil"]])
    with pytest.raises(DataError, match=r"'dsut' is in no class of the list \(dust, coil\)\. Add it there"):
        converted(tmp_path, classes=classes)
    found = converted(tmp_path, classes=classes, drop_others=True)
    assert (len(found.content["annotations"]), found.dropped) == (2, {coco.OTHER: 1})
    with pytest.raises(DataError, match=r"none of its classes \(coil, dsut\) is in the list of class texts \(zinc\)"):
        converted(tmp_path, classes=class_texts([["zinc"]]), drop_others=True)


def test_folders_and_files_of_another_form_are_named(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        labelme.read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="holds no JSON file"):
        labelme.read_folder(tmp_path)
    write(tmp_path, "a")
    with pytest.raises(DataError, match="is empty: its 1 labelme files have no shape"):
        converted(tmp_path)
    (tmp_path / "b.json").write_text("[[1]]")
    with pytest.raises(DataError, match=r"b\.json is no labelme file: it has no list of shapes"):
        labelme.read_folder(tmp_path)
    (tmp_path / "b.json").write_text('{"shapes": ')
    with pytest.raises(DataError, match=r"b\.json is no JSON"):
        labelme.read_folder(tmp_path)


def test_broken_entries_are_named(tmp_path):
    path = write(tmp_path, "a", {"points": [[1, 2]], "shape_type": "rectangle"})
    with pytest.raises(DataError, match=r"a\.json: shape 0 has no label"):
        labelme.read_folder(tmp_path)
    write(
        tmp_path, "a", shape("coil", "rectangle", (5, 5), (10, 10)), {**shape("coil", "polygon"), "points": [[1], [2]]}
    )
    with pytest.raises(DataError, match=r"a\.json: shape 1: points must be pairs of numbers"):
        converted(tmp_path)
    write(tmp_path, "a", shape("coil", "circle", (5, 5), (10, 10)))
    with pytest.raises(
        DataError, match=r"none of its shapes can be used: 1 boxes dropped \(1 shapes of the kind circle\)"
    ):
        converted(tmp_path)
    (tmp_path / "copy.json").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="belong to the same image"):
        labelme.read_folder(tmp_path)
    (tmp_path / "copy.json").unlink()
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"belongs to the image 'a\.png', which is not there\. Looked for"):
        labelme.read_folder(tmp_path)


def test_the_command_says_what_it_wrote_and_what_not(tmp_path, capsys):
    write(tmp_path / "in", "a", *(shape(label, "rectangle", (5, 5), (10, 10)) for label in ("coil", "dsut", "dust")))
    write(tmp_path / "in", "b", shape("coil", "line", (5, 5), (10, 10)))
    classes = tmp_path / "classes.json"
    classes.write_text('[["dust"], ["coil"]]')
    out = tmp_path / "all.json"
    assert labelme.main([str(tmp_path / "in"), str(out), "--classes", str(classes), "--drop-others"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}: 1 images, 2 objects (dust 1, coil 1)" in printed
    assert f"dropped: 1 {coco.OTHER}" in printed
    assert "dropped: 1 shapes of the kind line" in printed
    assert "left out, since every shape of theirs was dropped: b.png" in printed
    before = out.read_bytes()
    assert labelme.main([str(tmp_path / "in"), str(out), "--classes", str(classes)]) == 2
    assert "error: " in capsys.readouterr().err
    assert out.read_bytes() == before
    assert labelme.main([str(tmp_path / "in"), str(tmp_path / "in" / "all.json")]) == 2
    assert "would lie among the labelme files" in capsys.readouterr().err
    assert labelme.main([str(tmp_path / "in"), str(tmp_path / "all.txt")]) == 2


def test_the_help_explains_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["labelme", "--help"])
    with pytest.raises(SystemExit, match="0"):
        labelme.main()
    assert "Turn a folder of labelme JSON files into one COCO JSON file." in capsys.readouterr().out


def test_a_generated_category_comes_through_labelme_with_the_boxes_of_its_masks(tmp_path):
    root = generate.generate(tmp_path / "mvtec", ["washer"], images=3, good=1, size=96)
    layouts.write_labelme(root, "washer", tmp_path / "labelme", min_area=9, rectangles_below=200)
    kinds = {
        s["shape_type"] for p in (tmp_path / "labelme").glob("*.json") for s in json.loads(p.read_text())["shapes"]
    }
    assert kinds == {"rectangle", "polygon"}
    content = converted(tmp_path / "labelme").content
    named = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in named.values()}
    for note in content["annotations"]:
        left, top, width, height = note["bbox"]
        found[named[note["image_id"]]].append((left, top, left + width, top + height))
    category = mvtec.read_category(root, "washer")
    expected = {}
    for sample in (*category.train, *category.test):
        name = f"{sample.image.parent.parent.name}_{sample.image.parent.name}_{sample.image.name}"
        mask = np.zeros((1, 1)) if sample.mask is None else mvtec.read_pixels(sample.mask, cv2.IMREAD_GRAYSCALE)
        expected[name] = sorted(map(tuple, mvtec.boxes_from_mask(mask, 9)))
    assert {name: sorted(boxes) for name, boxes in found.items()} == expected


def test_a_labelme_folder_opens_as_a_data_set_and_says_what_it_did_not_use(tmp_path):
    for number in range(6):
        write(tmp_path, f"a{number}", shape(("coil", "dust")[number % 2], "rectangle", (5, 5), (25, 15)))
    write(tmp_path, "small", shape("coil", "rectangle", (5, 5), (7, 7)))
    write(tmp_path, "line", shape("coil", "line", (5, 5), (7, 7)))
    cv2.imwrite(str(tmp_path / "bare.png"), np.zeros((30, 40, 3), np.uint8))
    splits = open_dataset(tmp_path, size=32)
    assert (splits.form, splits.classes, len(splits.train) + len(splits.test)) == ("labelme", ("coil", "dust"), 6)
    assert [picture.image.name for picture in splits.train.left_out] == ["small.png"]
    text = "\n".join(splits.notes)
    for part in ("1 shapes of the kind line", "every shape was dropped: line.png", "1 images not used, since they have no JSON file",
                 f"1 {coco.SMALL}", "train: 1 images left out"):  # fmt: skip
        assert part in text
    item = splits.test[0]
    assert item["img"].shape == (3, 32, 32)
    assert item["bboxes"].tolist() == [pytest.approx([15 / 40, 10 / 30, 20 / 40, 10 / 30])]


def test_given_labelme_folders_are_the_sides(tmp_path):
    for side, names in (("train", "abc"), ("val", "de")):
        for name in names:
            write(tmp_path / side, name, shape("coil", "rectangle", (5, 5), (25, 15)))
    splits = open_dataset(tmp_path, size=32)
    assert [[p.image.name for p in side.samples] for side in (splits.train, splits.test)] == [
        ["a.png", "b.png", "c.png"], ["d.png", "e.png"],
    ]  # fmt: skip
    merged = open_dataset(tmp_path, size=32, split="hash", train_share=0.4)
    assert (len(merged.train), len(merged.test)) == (2, 3)
