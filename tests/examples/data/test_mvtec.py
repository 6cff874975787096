"""The example's data: what the generator writes, how masks become boxes, the split, text features, the schedule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")

from examples.yolo_world.data import generate, mvtec, texts  # noqa: E402
from examples.yolo_world.data.augment import flip_and_relight  # noqa: E402
from examples.yolo_world.data.images import Collate  # noqa: E402
from examples.yolo_world.data.surfaces import SURFACES  # noqa: E402
from examples.yolo_world.training import scores  # noqa: E402

IMAGES, GOOD, SIZE = 4, 2, 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate.generate(tmp_path_factory.mktemp("data"), ["tile", "washer"], images=IMAGES, good=GOOD, size=SIZE)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def test_the_layout_is_mvtec_ads(root):
    assert "GENERATED" in (root / generate.NOTICE).read_text(encoding="utf-8")
    for category in ("tile", "washer"):
        folder = root / category
        assert len(list((folder / "train" / "good").glob("*.png"))) == GOOD
        assert len(list((folder / "test" / "good").glob("*.png"))) == GOOD
        for defect in generate.DEFECTS:
            stems = [path.stem for path in sorted((folder / "test" / defect).glob("*.png"))]
            masks = [path.stem for path in sorted((folder / "ground_truth" / defect).glob("*.png"))]
            assert len(stems) == IMAGES
            assert masks == [f"{stem}_mask" for stem in stems]


def test_the_seed_decides_every_pixel(root, tmp_path):
    again = generate.generate(tmp_path / "again", ["tile"], images=IMAGES, good=GOOD, size=SIZE)
    other = generate.generate(tmp_path / "other", ["tile"], images=IMAGES, good=GOOD, size=SIZE, seed=1)
    first = {key: value for key, value in digests(root).items() if key.startswith("tile/")}
    assert digests(again) == first
    assert all(digests(other)[key] != value for key, value in first.items())


def test_no_picture_occurs_twice(root):
    pictures = [digest for key, digest in digests(root).items() if "ground_truth" not in key]
    assert len(set(pictures)) == len(pictures)


def test_a_finished_data_set_is_not_written_again_and_another_one_is(root):
    one = root / "tile" / "test" / "good" / "000.png"
    before = one.stat().st_mtime_ns
    generate.generate(root, ["tile", "washer"], images=IMAGES, good=GOOD, size=SIZE)
    assert one.stat().st_mtime_ns == before


def test_an_unknown_category_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such generated category: cheese"):
        generate.generate(tmp_path, ["cheese"])


@pytest.mark.parametrize("category", SURFACES)
@pytest.mark.parametrize("defect", generate.DEFECTS)
def test_every_defect_changes_the_picture_where_the_mask_says_on_every_surface(category, defect):
    rng = generate.seeded("changes", category, defect)
    image, part = SURFACES[category].draw(rng, 128)
    row, column = map(int, np.argwhere(part)[len(np.argwhere(part)) // 2])
    changed, mask = generate.DEFECTS[defect](image, SURFACES[category], (row, column), rng)
    difference = np.abs(changed - image).max(-1)
    assert mask.any()
    assert difference[mask].mean() > 5 * difference[~mask].mean()


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


def test_text_features_depend_on_the_name_alone():
    first = texts.load_texts(["stain", "dent"], use_clip=False)
    second = texts.load_texts(["scratch", "stain"], use_clip=False)
    assert torch.equal(first.table["stain"], second.table["stain"])
    assert "made from the class names" in first.source
    vectors = second.of(["scratch", "stain"])[0]
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert abs(float(vectors[0] @ vectors[1])) < 0.3
    digest = hashlib.sha256(np.round(texts.features_from_name("stain").double().numpy(), 4).tobytes()).hexdigest()
    assert digest[:12] == "68024b71ec58"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_text_features_come_from_a_file(tmp_path, suffix):
    from safetensors.torch import save_file

    path, table = tmp_path / f"texts{suffix}", {"dent": torch.randn(512), "stain": torch.randn(512)}
    torch.save(table, path) if suffix == ".pt" else save_file(table, path)
    found = texts.load_texts(["stain"], path)
    assert found.source == f"read from texts{suffix}"
    assert torch.equal(found.of(["stain", "dent"])[0], torch.stack([table["stain"], table["dent"]]))
    with pytest.raises(texts.TextError, match="no text features for scratch"):
        texts.load_texts(["scratch"], path)


def test_a_text_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "texts.pt"
    with pytest.raises(texts.TextError, match="there is no text feature file"):
        texts.load_texts(["dent"], path)
    torch.save({"dent": torch.randn(256)}, path)
    with pytest.raises(texts.TextError, match="'dent' must be a finite tensor"):
        texts.load_texts(["dent"], path)


def test_the_generator_runs_from_the_command_line(tmp_path, capsys):
    options = ["--categories", "mesh", "--images", "1", "--good", "1", "--size", "64"]
    assert generate.main([str(tmp_path), *options]) == 0
    assert "wrote generated data for mesh" in capsys.readouterr().out
    described = json.loads((tmp_path / generate.NOTICE).read_text(encoding="utf-8").splitlines()[-1])
    assert described["categories"] == ["mesh"]
