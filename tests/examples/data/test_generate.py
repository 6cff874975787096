"""The generated data: what is written, that the seed decides it, and that each defect shows where its mask says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.examples.generated import GOOD, IMAGES, SIZE

pytest.importorskip("ultralytics")
cv2 = pytest.importorskip("cv2")
from examples.yolo_world.data import generate  # noqa: E402
from examples.yolo_world.data.surfaces import SURFACES  # noqa: E402


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


def test_the_generator_runs_from_the_command_line(tmp_path, capsys):
    options = ["--categories", "mesh", "--images", "1", "--good", "1", "--size", "64"]
    assert generate.main([str(tmp_path), *options]) == 0
    assert "wrote generated data for mesh" in capsys.readouterr().out
    described = json.loads((tmp_path / generate.NOTICE).read_text(encoding="utf-8").splitlines()[-1])
    assert described["categories"] == ["mesh"]
