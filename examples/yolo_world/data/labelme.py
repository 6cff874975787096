"""Turn a folder of labelme JSON files into COCO JSON: rectangles and polygons become boxes and segmentations.

    python -m examples.yolo_world labelme FOLDER OUT.json
    python -m examples.yolo_world labelme FOLDER OUT.json --classes classes.json

Coordinates stay labelme's: a point lies between pixels, x from 0 to the width. The images are not copied; the COCO file
names them by their path from its own folder. Shapes of other kinds (circle, line, point, mask) are counted and left out.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .coco import CUT, DEGENERATE, OTHER, describe_dropped, fit_box, match_classes, read_json
from .files import write_atomically
from .images import SUFFIXES, DataError, image_size
from .texts import ClassTexts, TextError, load_class_texts

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One labelme file: its image with width and height, and its shapes as the file has them."""

    source: Path
    image: Path
    size: tuple[int, int]
    shapes: tuple[dict[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A COCO dictionary, its classes, how many shapes were dropped or cut and why, and images that lost every shape.

    Such images are not in the dictionary: there, an image without annotations counts as faultless.
    """

    content: dict[str, Any]
    classes: ClassTexts
    dropped: dict[str, int]
    left_out: tuple[Path, ...]


def looks_like_labelme(content: Any) -> bool:
    """Return whether a JSON file's content is labelme's: a dictionary with a list of shapes."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def find_image(path: Path, named: Any) -> Path:
    """Return the image of a labelme file: where ``imagePath`` says, else of that name beside the file, else of its own name.

    Raises:
        DataError: if there is none; says where it was looked for.
    """
    tried: list[Path] = []
    if isinstance(named, str) and named:
        slashed = named.replace("\\", "/")
        name = slashed.rsplit("/", 1)[-1]
        tried += [path.parent / slashed, path.parent / name, path.parent.parent / "images" / name]
    tried += [path.with_suffix(suffix) for suffix in SUFFIXES]
    for place in tried:
        if place.is_file():
            return place
    raise DataError(
        f"{path} belongs to the image {named!r}, which is not there. Looked for {', '.join(map(str, tried[:3]))}. "
        "Put the image beside the JSON file."
    )


def read_labelme(path: Path) -> Labelled:
    """Return a labelme file with its image's size; the size comes from the image.

    Raises:
        DataError: if it is no labelme file, its image is missing, or the file says another size than the image has.
    """
    content = read_json(path)
    if not looks_like_labelme(content):
        raise DataError(f"{path} is no labelme file: it has no list of shapes. Keep other JSON files elsewhere.")
    image = find_image(path, content.get("imagePath"))
    size = image_size(image)
    said = (content.get("imageWidth") or size[0], content.get("imageHeight") or size[1])
    if said != size:
        raise DataError(
            f"{image} is {size[0]}x{size[1]}, {path.name} says {said[0]}x{said[1]}. The shapes belong to another version of "
            "the image (resized, or turned by its EXIF entry); use the image that was labelled."
        )
    for place, shape in enumerate(content["shapes"]):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
            raise DataError(f"{path}: shape {place} has no label.")
    return Labelled(path, image, size, tuple(content["shapes"]))


def read_folder(folder: Path) -> list[Labelled]:
    """Return the labelme files of a folder, sorted by name.

    Raises:
        DataError: if there are none, two belong to the same image, or one cannot be read (see ``read_labelme``).
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. It should hold labelme's JSON files.")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no JSON file; labelme writes one beside each image.")
    found = [read_labelme(path) for path in tqdm(paths, desc="labelme", unit="file", disable=len(paths) < 100)]
    owners: dict[Path, Path] = {}
    for entry in found:
        other = owners.setdefault(entry.image.resolve(), entry.source)
        if other is not entry.source:
            raise DataError(f"{entry.source} and {other} belong to the same image {entry.image}; keep one of them.")
    return found


def outline(shape: Mapping[str, Any], where: str) -> Points | None:
    """Return a shape's corners in order, or None if its kind has no area that is known here.

    A rectangle is given by two opposite corners, in any order; a shape without a kind is a polygon.

    Raises:
        DataError: if the points are no pairs of numbers.
    """
    kind = shape.get("shape_type") or "polygon"
    if kind not in ("rectangle", "polygon"):
        return None
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: points must be pairs of numbers, they are {shape.get('points')!r}.") from error
    if kind == "rectangle" and points:
        across, down = [x for x, _ in points], [y for _, y in points]
        left, top, right, bottom = min(across), min(down), max(across), max(down)
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    return points


def area_of(points: Points) -> float:
    """Return the area inside a polygon that does not cross itself.

    Example:
        >>> area_of([(0, 0), (4, 0), (4, 3)])
        6.0
    """
    following = points[1:] + points[:1]
    return abs(sum(x * below - beside * y for (x, y), (beside, below) in zip(points, following, strict=True))) / 2


def fit_polygon(points: Points, size: tuple[int, int]) -> tuple[Points, str | None]:
    """Return the polygon with its corners moved into the image, or no corners, and the reason if it was changed or dropped.

    Moving a corner onto the border keeps the box exact; the outline beside the border may shift a little.
    """
    if len(points) < 3:
        return [], DEGENERATE
    across, down = [x for x, _ in points], [y for _, y in points]
    if not all(map(math.isfinite, across + down)):
        return [], DEGENERATE
    box, reason = fit_box((min(across), min(down), max(across), max(down)), size, 0)
    if box is None:
        return [], reason
    moved = [(min(max(x, 0.0), float(size[0])), min(max(y, 0.0), float(size[1]))) for x, y in points]
    return (moved, reason) if area_of(moved) > 0 else ([], DEGENERATE)


def annotations_of(
    entry: Labelled, places: Mapping[str, int], dropped: collections.Counter[str]
) -> list[dict[str, Any]]:
    """Return the annotations of one file without ids; adds to ``dropped`` what is left out or cut.

    Shapes of one label that share a ``group_id`` are parts of one object: one annotation with several polygons, whose
    area is the sum (parts should not overlap).
    """
    objects: dict[Any, list[Points]] = {}
    for place, shape in enumerate(entry.shapes):
        label = shape["label"].strip()
        if label not in places:
            dropped[OTHER] += 1
            continue
        points = outline(shape, f"{entry.source}: shape {place}")
        if points is None:
            dropped[f"shapes of the kind {shape['shape_type']}"] += 1
            continue
        points, reason = fit_polygon(points, entry.size)
        if reason is not None:
            dropped[reason] += 1
        if points:
            group = shape.get("group_id")
            objects.setdefault((label, ("alone", place) if group is None else group), []).append(points)
    return [annotation(places[label], polygons) for (label, _), polygons in objects.items()]


def annotation(place: int, polygons: Sequence[Points]) -> dict[str, Any]:
    """Return a COCO annotation of the class at ``place`` around some polygons, without ids."""
    across = [x for polygon in polygons for x, _ in polygon]
    down = [y for polygon in polygons for _, y in polygon]
    return {
        "category_id": place + 1,
        "bbox": [min(across), min(down), max(across) - min(across), max(down) - min(down)],
        "area": sum(map(area_of, polygons)),
        "segmentation": [[value for point in polygon for value in point] for polygon in polygons],
        "iscrowd": 0,
    }


def convert(entries: Sequence[Labelled], base: Path, classes: ClassTexts | None = None, *, drop_others: bool = False) -> Converted:  # fmt: skip
    """Return labelme files as one COCO dictionary; ids count from 1, categories are in the order of the classes.

    Args:
        entries: what ``read_folder`` gives.
        base: folder that the images' names start from.
        classes: the classes in order, with synonyms; default: the labels, sorted.
        drop_others: leave out labels that are in no class, instead of refusing them.

    Raises:
        DataError: if a label is in no class and is not to be dropped, or no shape is left.
    """
    labels = sorted({shape["label"].strip() for entry in entries for shape in entry.shapes})
    if not labels:
        raise DataError(f"{entries[0].source.parent} is empty: its {len(entries)} labelme files have no shape.")
    classes, places = match_classes(labels, classes, str(entries[0].source.parent), drop_others=drop_others)
    dropped: collections.Counter[str] = collections.Counter()
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    left_out: list[Path] = []
    for entry in tqdm(entries, desc="shapes", unit="file", disable=len(entries) < 100):
        wanted = any(shape["label"].strip() in places for shape in entry.shapes)
        found = annotations_of(entry, places, dropped)
        if wanted and not found:
            left_out.append(entry.image)
            continue
        name = Path(os.path.relpath(entry.image.resolve(), base.resolve())).as_posix()
        images.append({"id": len(images) + 1, "file_name": name, "width": entry.size[0], "height": entry.size[1]})
        notes += [{"id": len(notes) + place, "image_id": len(images), **note} for place, note in enumerate(found, 1)]
    if not notes:
        where, phrase = entries[0].source.parent, describe_dropped(dropped, ": ")
        raise DataError(f"{where} is empty: none of its shapes can be used{phrase}.")
    categories = [{"id": place + 1, "name": name, "supercategory": ""} for place, name in enumerate(classes.names)]
    return Converted(
        {"images": images, "annotations": notes, "categories": categories}, classes, dict(dropped), tuple(left_out)
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.yolo_world labelme",
        description="Turn a folder of labelme JSON files into one COCO JSON file.",
        epilog="The images stay where they are; OUT.json names them by their path from its own folder.",
    )
    parser.add_argument("folder", type=Path, help="folder with labelme's JSON files")
    parser.add_argument("out", type=Path, metavar="OUT.json", help="COCO file to write")
    parser.add_argument("--classes", type=Path, metavar="FILE",
                        help='JSON list of class texts, such as [["defect"], ["coil"]]: the order of the categories; '
                             "default: the labels, sorted")  # fmt: skip
    parser.add_argument("--drop-others", action="store_true", help="leave out labels that are in no class of the list")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert from the command line and return the exit status."""
    args = make_parser().parse_args(arguments)
    try:
        if args.out.suffix != ".json":
            raise DataError(f"{args.out} does not end in .json.")
        if args.out.resolve().parent == args.folder.resolve():
            raise DataError(f"{args.out} would lie among the labelme files and be read as one; write it elsewhere.")
        classes = load_class_texts(args.classes) if args.classes is not None else None
        done = convert(read_folder(args.folder), args.out.parent, classes, drop_others=args.drop_others)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, json.dumps(done.content, ensure_ascii=False).encode())
    except (DataError, TextError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = collections.Counter(note["category_id"] for note in done.content["annotations"])
    by_class = ", ".join(f"{name} {counts[place + 1]}" for place, name in enumerate(done.classes.names))
    print(f"wrote {args.out}: {len(done.content['images'])} images, {sum(counts.values())} objects ({by_class})")
    for reason, count in sorted(done.dropped.items()):
        print(f"  {'changed' if reason == CUT else 'dropped'}: {count} {reason}")
    if done.left_out:
        print(f"  left out, since every shape of theirs was dropped: {', '.join(path.name for path in done.left_out)}")
    return 0
