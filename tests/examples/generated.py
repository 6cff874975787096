"""What tests of the example's data are made of: the size of the generated set, and small COCO files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, GOOD, SIZE = 4, 2, 96


def content(images: int = 4, first: int = 0) -> dict[str, Any]:
    """Return a small COCO dictionary: one box of ``coil`` and one of ``dust`` on each image of 40x30 pixels."""
    return {
        "info": {"description": "generated"},
        "images": [{"id": 7 + n, "file_name": f"{first + n}.png", "width": 40, "height": 30} for n in range(images)],
        "annotations": [
            {"id": 2 * n + k, "image_id": 7 + n, "category_id": category, "bbox": box, "area": 50, "iscrowd": 0}
            for n in range(images)
            for k, (category, box) in enumerate(((5, [4, 6, 10, 8]), (2, [20.5, 10, 12, 15])))
        ],
        "categories": [{"id": 5, "name": "dust"}, {"id": 2, "name": "coil"}],
    }


def write(path: Path, data: dict[str, Any], images: Path | None = None) -> Path:
    """Write a COCO file and its images into ``images`` (default: beside it)."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    for entry in data["images"]:
        file = (images or path.parent) / entry["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(entry["id"]).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(file), pixels)
    return path
