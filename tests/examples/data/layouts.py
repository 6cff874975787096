"""Write a category in MVTec AD's layout again as COCO JSON or as labelme JSON, to try the other readers on the same images.

    python -m examples.yolo_world generate runs/data --categories tile
    python -m tests.examples.data.layouts runs/data tile --form coco runs/tile_coco
    python -m tests.examples.data.layouts runs/data tile --form labelme runs/tile_labelme

The images are copied. In COCO form the sides of ``read_category`` become ``train.json`` and ``val.json``; labelme has one
folder, with rectangles for small parts of a mask and their convex outlines for the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from examples.yolo_world.data.images import DataError, read_pixels
from examples.yolo_world.data.mvtec import Sample, read_category

FORMS = ("coco", "labelme")


def outlines(mask: np.ndarray, min_area: int) -> list[np.ndarray]:
    """Return the convex outline of each connected part of a mask, float64 ``(n, 2)`` x y in pixels, borders included.

    Its bounds are those of the part's box in ``mvtec.boxes_from_mask``.
    """
    count, parts, stats, _ = cv2.connectedComponentsWithStats((mask > 0).astype(np.uint8), connectivity=8)
    found = []
    for part in range(1, count):
        if stats[part, cv2.CC_STAT_AREA] < min_area:
            continue
        rows, columns = np.nonzero(parts == part)
        corners = [np.stack([columns + right, rows + down], 1) for right in (0, 1) for down in (0, 1)]
        hull = cv2.convexHull(np.concatenate(corners).astype(np.int32))
        found.append(hull[:, 0].astype(np.float64))
    return found


def polygon_area(points: np.ndarray) -> float:
    """Return the area inside a polygon, ``(n, 2)``."""
    across, down = points.T
    return float(abs(np.dot(across, np.roll(down, -1)) - np.dot(down, np.roll(across, -1))) / 2)


def copy_image(sample: Sample, folder: Path) -> tuple[str, tuple[int, int], np.ndarray]:
    """Copy a sample's image into a folder under a name of its own; return the name, its (width, height), and the mask."""
    side = sample.image.parent.parent.name
    name = f"{side}_{sample.image.parent.name}_{sample.image.name}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(sample.image, folder / name)
    height, width = read_pixels(sample.image, cv2.IMREAD_COLOR).shape[:2]
    mask = np.zeros((height, width), np.uint8)
    return name, (width, height), read_pixels(sample.mask, cv2.IMREAD_GRAYSCALE) if sample.mask is not None else mask


def write_coco(
    root: Path, category: str, folder: Path, *, train_share: float = 0.6, seed: int = 0, min_area: int = 25
) -> Path:
    """Write a category as ``images/`` and ``annotations/{train,val}.json`` below ``folder``; return ``folder``."""
    read = read_category(root, category, train_share=train_share, seed=seed)
    for side, samples in (("train", read.train), ("val", read.test)):
        images: list[dict[str, Any]] = []
        notes: list[dict[str, Any]] = []
        for sample in samples:
            name, (width, height), mask = copy_image(sample, folder / "images")
            images.append({"id": len(images) + 1, "file_name": name, "width": width, "height": height})
            for points in outlines(mask, min_area):
                left, top, right, bottom = (*points.min(0).tolist(), *points.max(0).tolist())
                notes.append(
                    {
                        "id": len(notes) + 1, "image_id": len(images), "iscrowd": 0,
                        "category_id": read.classes.index(sample.defect or "") + 1,
                        "bbox": [left, top, right - left, bottom - top], "area": polygon_area(points),
                        "segmentation": [points.ravel().tolist()],
                    }
                )  # fmt: skip
        categories = [{"id": place, "name": name} for place, name in enumerate(read.classes, 1)]
        content = {"images": images, "annotations": notes, "categories": categories}
        target = folder / "annotations" / f"{side}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_labelme(root: Path, category: str, folder: Path, *, min_area: int = 25, rectangles_below: int = 400) -> Path:
    """Write a category as images with labelme JSON files beside them; return ``folder``.

    Args:
        root: folder that holds the categories.
        category: which one.
        folder: folder to write.
        min_area: smaller parts of a mask, in pixels, give no shape.
        rectangles_below: parts whose outline has a smaller area become rectangles, the others polygons.
    """
    read = read_category(root, category)
    for sample in (*read.train, *read.test):
        name, (width, height), mask = copy_image(sample, folder)
        shapes = []
        for points in outlines(mask, min_area):
            small = polygon_area(points) < rectangles_below
            shapes.append(
                {
                    "label": sample.defect, "group_id": None, "flags": {},
                    "points": [points.max(0).tolist(), points.min(0).tolist()] if small else points.tolist(),
                    "shape_type": "rectangle" if small else "polygon",
                }
            )  # fmt: skip
        content = {
            "version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": name, "imageData": None,
            "imageHeight": height, "imageWidth": width,
        }  # fmt: skip
        (folder / name).with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Write from the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.examples.data.layouts",
        description="Write a category in MVTec AD's layout again as COCO JSON or as labelme JSON.",
    )
    parser.add_argument("root", type=Path, help="folder that holds the categories")
    parser.add_argument("category")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--form", choices=FORMS, default="coco", help="default coco")
    parser.add_argument("--min-area", type=int, default=25, help="smallest part of a mask, in pixels (default 25)")
    args = parser.parse_args(arguments)
    write = write_coco if args.form == "coco" else write_labelme
    try:
        write(args.root, args.category, args.folder, min_area=args.min_area)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.category} as {args.form} to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
