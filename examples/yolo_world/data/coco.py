"""Read detection data from COCO JSON: one file that is split here, or a folder with files for training and testing.

    annotations/instances_train.json, annotations/instances_val.json     images beside, or where the names say
    train/_annotations.coco.json, valid/_annotations.coco.json           images beside each file
    any.json                                                             split by a hash of the images' names

What cannot be used is never dropped in silence: ``CocoSide.dropped`` counts it by reason.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .images import DataError, Picture, image_size, split_by_hash
from .texts import ClassTexts

CROWD, SMALL = "crowd regions", "smaller than the minimum area"
OUTSIDE, DEGENERATE = "outside the image", "without width or height"
CUT, OTHER = "cut at the image's border", "of classes that are not in the list"
SIDE_NAMES = {"train": ("train",), "test": ("val", "valid", "validation", "test")}


@dataclasses.dataclass(frozen=True)
class CocoSide:
    """The pictures of one COCO file, those whose every box was dropped, and how many boxes were dropped or cut, and why."""

    pictures: tuple[Picture, ...]
    left_out: tuple[Picture, ...]
    dropped: Mapping[str, int]


def read_json(path: Path) -> Any:
    """Return a JSON file's content.

    Raises:
        DataError: if the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}.") from error


def looks_like_coco(content: Any) -> bool:
    """Return whether a JSON file's content has COCO's three lists."""
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories"))  # fmt: skip


def read_coco(path: Path) -> dict[str, Any]:
    """Return a COCO file's content, its lists and ids checked.

    Raises:
        DataError: if it is no COCO file, is empty, names an id twice, or an annotation points to nothing.
    """
    content = read_json(path)
    if not looks_like_coco(content):
        raise DataError(f"{path} is no COCO file: it must hold the lists images, annotations and categories.")
    for key in ("images", "categories"):
        if not content[key]:
            raise DataError(f"{path} is empty: its list of {key} has no entry.")
    for key, fields in (("images", ("id", "file_name")), ("categories", ("id", "name")), ("annotations", ("image_id", "category_id"))):  # fmt: skip
        for place, entry in enumerate(content[key]):
            missing = [field for field in fields if not isinstance(entry, dict) or not isinstance(entry.get(field), int | str)]  # fmt: skip
            if missing:
                raise DataError(f"{path}: entry {place} of {key} has no {' and no '.join(missing)}.")
        for field in {"id", "file_name"} & set(fields):
            twice = [value for value, count in collections.Counter(e[field] for e in content[key]).items() if count > 1]
            if twice:
                raise DataError(f"{path}: {key} has the {field} {twice[0]} more than once.")
    check_references(content, path)
    return dict(content)


def check_references(content: Mapping[str, Any], path: Path) -> None:
    """Check that every annotation's image and category exist.

    Raises:
        DataError: naming the ids that are missing, and the first annotation that has one.
    """
    for field, key in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[key]}
        lost = [(place, note[field]) for place, note in enumerate(content["annotations"]) if note[field] not in known]
        if lost:
            ids = sorted({str(value) for _, value in lost})
            raise DataError(
                f"{path}: {len(lost)} annotations have a {field} that is not in {key} ({', '.join(ids[:5])}); the first is "
                f"entry {lost[0][0]}. Add the missing entries to {key}, or take the annotations out."
            )


def used_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the categories that an annotation has, in the order of their ids."""
    used = {annotation["category_id"] for annotation in content["annotations"]}
    return category_names({"categories": [entry for entry in content["categories"] if entry["id"] in used]})


def category_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the category names in the order of their ids."""
    return tuple(
        entry["name"].strip()
        for entry in sorted(content["categories"], key=lambda entry: (str(type(entry["id"])), entry["id"]))
    )


def image_folders(path: Path) -> list[Path]:
    """Return where the images of a COCO file may lie, the likeliest first."""
    parent, short = path.parent, path.stem.removeprefix("instances_")
    sides = [name for names in SIDE_NAMES.values() for name in names if name in short.lower()]
    near = [base / name for base in (parent, parent.parent) for name in ("", "images", short, f"images/{short}")]
    return list(dict.fromkeys([*near, *(base / name for name in sides for base in near[:2] + near[4:6])]))


def find_images(names: Sequence[str], path: Path, images: Path | None = None) -> list[Path]:
    """Return the image file of each name.

    Args:
        names: as the COCO file has them; backslashes are read as slashes.
        path: the COCO file; images are looked for near it.
        images: folder to look in instead.

    Raises:
        DataError: if no folder has them all; says how many are missing in the best one, and which folders were tried.
    """
    folders = [images] if images is not None else image_folders(path)
    best: list[Path] = []
    missing: list[str] = list(names)
    for folder in folders:
        found = [folder / name.replace("\\", "/") for name in names]
        lost = [name for name, file in zip(names, found, strict=True) if not file.is_file()]
        if not lost:
            return found
        if not best or len(lost) < len(missing):
            best, missing = found, lost
    place = best[0].parent if best else path.parent
    raise DataError(
        f"{path}: {len(missing)} of {len(names)} images are not there, for one {missing[0]} in {place}. "
        f"Looked in {', '.join(str(folder) for folder in folders if folder.is_dir()) or folders[0]}. "
        "Give their folder (--image-folder)."
    )


def check_sizes(files: Sequence[Path], entries: Sequence[Mapping[str, Any]], path: Path) -> list[tuple[int, int]]:
    """Return width and height of each image from its file.

    Raises:
        DataError: if an image cannot be read, or its size is not the one in the COCO file.
    """
    sizes = []
    pairs = zip(files, entries, strict=True)
    for file, entry in tqdm(pairs, desc="images", total=len(files), unit="image", disable=len(files) < 500):
        size = image_size(file)
        said = (entry.get("width") or size[0], entry.get("height") or size[1])
        if said != size:
            raise DataError(
                f"{file} is {size[0]}x{size[1]}, {path.name} says {said[0]}x{said[1]}. The boxes belong to another version of "
                "the image (resized, or turned by its EXIF entry); convert the annotations again."
            )
        sizes.append(size)
    return sizes


def box_of(annotation: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    """Return an annotation's box as x1 y1 x2 y2: from ``bbox``, else around its polygons.

    Raises:
        DataError: if it has neither, or they are no numbers.
    """
    bbox, polygons = annotation.get("bbox"), annotation.get("segmentation")
    try:
        if bbox:
            left, top, width, height = (float(value) for value in bbox)
            return left, top, left + width, top + height
        if isinstance(polygons, list) and polygons:
            numbers = [[float(value) for value in polygon] for polygon in polygons]
            across = [value for polygon in numbers for value in polygon[0::2]]
            down = [value for polygon in numbers for value in polygon[1::2]]
            return min(across), min(down), max(across), max(down)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: a box must be [x, y, width, height] in numbers, this is {bbox or polygons!r}.") from error  # fmt: skip
    raise DataError(f"{where} has neither a bbox nor polygons.")


def fit_box(
    box: tuple[float, float, float, float], size: tuple[int, int], min_area: float
) -> tuple[tuple[float, float, float, float] | None, str | None]:
    """Return the box cut at the image's border, or None, and the reason if it was dropped or cut.

    A quarter of a pixel over the border is rounding and is cut without a word.
    """
    left, top, right, bottom = box
    width, height = size
    if not all(map(math.isfinite, box)) or right <= left or bottom <= top:
        return None, DEGENERATE
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return None, OUTSIDE
    cut = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    if (cut[2] - cut[0]) * (cut[3] - cut[1]) < min_area:
        return None, SMALL
    return cut, CUT if max(abs(a - b) for a, b in zip(cut, box, strict=True)) > 0.25 else None


def match_classes(
    found: Sequence[str], classes: ClassTexts | None, where: str, *, drop_others: bool
) -> tuple[ClassTexts, dict[str, int]]:
    """Return the classes, and the class index of each name that was found.

    Args:
        found: names in the data.
        classes: what is wanted, in order; a name belongs to the class that has it among its texts. None takes ``found``.
        where: what the names were read from, for errors.
        drop_others: whether names that are in no class are left out rather than refused.

    Raises:
        DataError: if names are in no class and are not to be dropped, or none is in any.
    """
    if classes is None:
        names = tuple(dict.fromkeys(found))
        return ClassTexts(tuple((name,) for name in names)), {name: place for place, name in enumerate(names)}
    places = {name: place for name in found if (place := classes.index_of(name)) is not None}
    others = [name for name in dict.fromkeys(found) if name not in places]
    wanted = ", ".join(classes.names)
    if found and not places:
        raise DataError(f"{where}: none of its classes ({', '.join(found)}) is in the list of class texts ({wanted}).")
    if others and not drop_others:
        raise DataError(
            f"{where}: {', '.join(map(repr, others))} is in no class of the list ({wanted}). Add it there, as a class or as "
            "a synonym, or leave such boxes out (--drop-others)."
        )
    return classes, places


def pictures_of(
    content: Mapping[str, Any], files: Mapping[Any, Path], sizes: Mapping[Any, tuple[int, int]],
    classes: ClassTexts, places: Mapping[str, int], min_area: float, path: Path,
) -> CocoSide:  # fmt: skip
    """Return the pictures of a checked COCO file.

    An image is left out if it had boxes of the classes and lost all of them; one that had none is a faultless image.
    """
    named = {entry["id"]: entry["name"].strip() for entry in content["categories"]}
    dropped: collections.Counter[str] = collections.Counter()
    boxes: dict[Any, list[tuple[tuple[float, float, float, float], int]]] = collections.defaultdict(list)
    lost: set[Any] = set()
    for place, note in enumerate(content["annotations"]):
        image, name = note["image_id"], named[note["category_id"]]
        if name not in places:
            dropped[OTHER] += 1
            continue
        if note.get("iscrowd"):
            box, reason = None, CROWD
        else:
            box, reason = fit_box(box_of(note, f"{path}: annotation {note.get('id', place)}"), sizes[image], min_area)
        if reason is not None:
            dropped[reason] += 1
        if box is None:
            lost.add(image)
        else:
            boxes[image].append((box, places[name]))
    pictures, left_out = [], []
    for entry in content["images"]:
        key, kept = entry["id"], boxes[entry["id"]]
        first = classes.names[kept[0][1]] if kept else None
        corners, labels = tuple(box for box, _ in kept), tuple(label for _, label in kept)
        name = str(entry["file_name"]).replace("\\", "/")
        picture = Picture(files[key], *sizes[key], boxes=corners, labels=labels, defect=first, name=name)
        (left_out if key in lost and not kept else pictures).append(picture)
    return CocoSide(tuple(pictures), tuple(left_out), dict(dropped))


def read_side(
    path: Path, content: Mapping[str, Any], classes: ClassTexts, places: Mapping[str, int], *,
    min_area: float, images: Path | None = None,
) -> CocoSide:  # fmt: skip
    """Return the pictures of a COCO file's content: images found, sizes and boxes checked.

    Raises:
        DataError: see ``find_images``, ``check_sizes`` and ``box_of``.
    """
    entries = content["images"]
    files = find_images([str(entry["file_name"]) for entry in entries], path, images)
    sizes = check_sizes(files, entries, path)
    keys = [entry["id"] for entry in entries]
    side = pictures_of(
        content, dict(zip(keys, files, strict=True)), dict(zip(keys, sizes, strict=True)), classes, places, min_area, path
    )  # fmt: skip
    if not any(picture.boxes for picture in side.pictures):
        raise DataError(f"{path} is empty: it has no box that can be used{describe_dropped(side.dropped, ' (', ')')}.")
    return side


def describe_dropped(dropped: Mapping[str, int], before: str = "", after: str = "") -> str:
    """Return a phrase that counts what was dropped or cut, or nothing if nothing was.

    Example:
        >>> describe_dropped({"crowd regions": 2, "cut at the image's border": 1})
        "2 boxes dropped (2 crowd regions), 1 cut at the image's border"
    """
    lost = {reason: count for reason, count in sorted(dropped.items()) if count and reason != CUT}
    parts = []
    if lost:
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        parts.append(f"{sum(lost.values())} boxes dropped ({reasons})")
    if dropped.get(CUT):
        parts.append(f"{dropped[CUT]} {CUT}")
    return before + ", ".join(parts) + after if parts else ""


def split_pictures(pictures: Sequence[Picture], share: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Return the pictures as (train, test), split by a hash of seed and name within each group.

    A picture's group is its rarest class; those without boxes are a group too. Each group with two pictures or more is on
    both sides, and a single one trains. Where that leaves nothing to test on, all pictures are one group.
    """
    counts = collections.Counter(label for picture in pictures for label in set(picture.labels))
    rarest = [min(set(p.labels), key=lambda label: (counts[label], label), default=-1) for p in pictures]
    if max(collections.Counter(rarest).values(), default=0) < 2:
        rarest = [0] * len(pictures)
    groups: dict[int, dict[Path, Picture]] = collections.defaultdict(dict)
    for group, picture in zip(rarest, pictures, strict=True):
        groups[group][Path(picture.name.lstrip("/"))] = picture
    sides: tuple[list[Picture], list[Picture]] = ([], [])
    for _, members in sorted(groups.items()):
        for side, names in zip(sides, split_by_hash(list(members), share, seed, Path()), strict=True):
            side += [members[name] for name in names]
    return sides


def side_of(stem: str) -> str | None:
    """Return ``train`` or ``test`` if a file's or folder's name says so.

    Example:
        >>> [side_of(name) for name in ("instances_train2017", "valid", "all", "test-dev")]
        ['train', 'test', None, 'test']
    """
    words = "".join(letter if letter.isalpha() else " " for letter in stem.lower()).split()
    return next((side for side, names in SIDE_NAMES.items() if any(word in names for word in words)), None)


def find_files(folder: Path, is_coco: Callable[[Path], bool]) -> dict[str, Path]:
    """Return the COCO files of a folder by side, ``train`` and ``test``; or its only one as ``all``; or nothing.

    Where both a validation and a test file are there, validation is taken: the test file may have no boxes.

    Raises:
        DataError: if it cannot be told which files are meant.
    """
    nested = [path for names in SIDE_NAMES.values() for name in names for path in (folder / name).glob("*.json")]
    found = [
        p for p in sorted([*folder.glob("*.json"), *(folder / "annotations").glob("*.json"), *nested]) if is_coco(p)
    ]
    instances = [path for path in found if path.stem.startswith("instances")]
    found = instances or found
    if len(found) <= 1:
        return {"all": found[0]} if found else {}
    sides: dict[str, list[Path]] = collections.defaultdict(list)
    for path in found:
        sides[side_of(path.stem) or side_of(path.parent.name) or "unknown"].append(path)
    validation = [
        p for p in sides["test"] if "val" in f"{p.parent.name if p.parent != folder else ''} {p.stem}".lower()
    ]
    tests = validation or sides["test"]
    if len(sides["train"]) != 1 or len(tests) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise DataError(
            f"{folder} has several COCO files ({names}), and their names do not tell one for training and one for "
            "testing (train, val). Rename them, or give one file."
        )
    return {"train": sides["train"][0], "test": tests[0]}
