"""The generated data set that the tests of the example's data share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .generated import GOOD, IMAGES, SIZE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two generated categories, made once for each test file."""
    pytest.importorskip("cv2")
    from examples.yolo_world.data import generate

    return generate.generate(tmp_path_factory.mktemp("data"), ["tile", "washer"], images=IMAGES, good=GOOD, size=SIZE)
