"""Read a folder in MVTec AD's layout as a detection data set: one box per connected part of a mask.

    <root>/<category>/train/good/*.png
    <root>/<category>/test/<defect>/*.png                     test/good/*.png
    <root>/<category>/ground_truth/<defect>/*_mask.png

MVTec AD keeps every defect in ``test/``, since it is made for training on good parts alone. A detector needs
defects to learn from, so the defect images are split here: within each defect they are ordered by a hash of seed
and path, and the first share of them trains. The split depends on nothing else, both sides are disjoint, and every
defect with two images or more is on both. ``train/good`` is added to training and ``test/good`` to testing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from .images import Augment, DataError, DetectionImages, images_in, read_pixels, split_by_hash, to_centred, to_square


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image file, its mask file, and the name of its defect (both None where the image is good)."""

    image: Path
    mask: Path | None = None
    defect: str | None = None


@dataclasses.dataclass(frozen=True)
class Category:
    """One category: its name, its classes (the defect names, sorted), and the two sides of the split."""

    name: str
    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


def list_categories(root: Path) -> list[str]:
    """Return the names of the categories below ``root``, sorted.

    Raises:
        DataError: if ``root`` is no folder, or holds no folder with a ``test`` folder in it.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder. --data wants the folder that holds the categories of MVTec AD.")
    names = sorted(path.name for path in root.iterdir() if (path / "test").is_dir())
    if not names:
        raise DataError(f"{root} holds no <category>/test folder. Is it one level too deep, or too high?")
    return names


def find_mask(folder: Path, defect: str, image: Path) -> Path:
    """Return the mask of a defect image.

    Raises:
        DataError: if neither ``<stem>_mask.png`` nor ``<stem>.png`` is in ``ground_truth/<defect>``.
    """
    truth = folder / "ground_truth" / defect
    for name in (f"{image.stem}_mask.png", f"{image.stem}.png"):
        if (truth / name).is_file():
            return truth / name
    raise DataError(f"{image} has no mask: expected {truth / (image.stem + '_mask.png')}.")


def read_category(root: Path, name: str, *, train_share: float = 0.6, seed: int = 0, good_limit: int = 16) -> Category:
    """Return one category with its defect images split for training and testing; reads no pixels yet.

    Args:
        root: folder that holds the categories.
        name: the category's folder.
        train_share: part of each defect's images that trains.
        seed: another seed gives another split.
        good_limit: at most so many images of ``train/good`` and of ``test/good`` are used.

    Raises:
        DataError: if the category, its defects or a mask is missing.
    """
    folder = root / name
    if not (folder / "test").is_dir():
        there = ", ".join(list_categories(root))
        raise DataError(f"{root} has no category '{name}' with a test folder. There are: {there}.")
    classes = sorted(path.name for path in (folder / "test").iterdir() if path.name != "good" and images_in(path))
    if not classes:
        raise DataError(f"{folder / 'test'} holds no defect images, only 'good' or nothing.")
    train = [Sample(path) for path in images_in(folder / "train" / "good")[:good_limit]]
    test = [Sample(path) for path in images_in(folder / "test" / "good")[:good_limit]]
    for defect in classes:
        sides = split_by_hash(images_in(folder / "test" / defect), train_share, seed, root)
        for side, paths in zip((train, test), sides, strict=True):
            side += [Sample(path, find_mask(folder, defect, path), defect) for path in paths]
    return Category(name, tuple(classes), tuple(train), tuple(test))


def boxes_from_mask(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Return the boxes of the connected parts of a mask: float64 ``(n, 4)``, x1 y1 x2 y2 in pixels.

    Parts that touch at a corner are one. A box ends *after* its last pixel, so one pixel is 1 wide.

    Args:
        mask: ``(height, width)``; everything above 0 is defect.
        min_area: smaller parts (in pixels) give no box.
    """
    _, _, parts, _ = cv2.connectedComponentsWithStats((mask > 0).astype(np.uint8), connectivity=8)
    boxes = [(x, y, x + width, y + height) for x, y, width, height, area in parts[1:] if area >= min_area]
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def load_sample(sample: Sample, size: int, min_area: int) -> tuple[Tensor, Tensor]:
    """Return a sample's image, uint8 ``(3, size, size)`` RGB, and boxes, ``(n, 4)`` centre-x centre-y w h in [0, 1].

    Raises:
        DataError: if a file cannot be read, or image and mask differ in size.
    """
    pixels = read_pixels(sample.image, cv2.IMREAD_COLOR)
    height, width = pixels.shape[:2]
    boxes = np.zeros((0, 4))
    if sample.mask is not None:
        mask = read_pixels(sample.mask, cv2.IMREAD_GRAYSCALE)
        if mask.shape != (height, width):
            raise DataError(f"{sample.mask} is {mask.shape[1]}x{mask.shape[0]}, its image is {width}x{height}.")
        boxes = boxes_from_mask(mask, min_area)
    return to_square(pixels, size), to_centred(boxes, width, height)


class DefectImages(DetectionImages):
    """The images of some samples, held in memory, as ``{img, cls, bboxes}``.

    Args:
        samples: what to read; a defect image whose every part is below ``min_area`` is left out (see ``left_out``).
        classes: class names in the order of the text features.
        size: height and width the images are resized to (a multiple of 32).
        min_area: smallest connected part of a mask that gives a box, in pixels of the mask.
        augmentation: see ``DetectionImages``; None changes nothing.
        label_of: class index of each defect; default: its place in ``classes``.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str],
        *,
        size: int,
        min_area: int,
        augmentation: Augment | None = None,
        label_of: Mapping[str, int] | None = None,
    ) -> None:
        self.classes, self.size, self.augmentation = tuple(classes), size, augmentation
        self.samples, self.left_out, self.boxes, self.labels = [], [], [], []
        loaded: list[tuple[Tensor, Tensor]] = []
        places = {name: place for place, name in enumerate(self.classes)} if label_of is None else label_of
        for sample in samples:
            image, boxes = load_sample(sample, size, min_area)
            if sample.defect is not None and not len(boxes):
                self.left_out.append(sample)
                continue
            label = places[sample.defect] if sample.defect is not None else 0
            self.samples.append(sample)
            self.labels.append(torch.full((len(boxes),), label))
            self.boxes.append(boxes)
            loaded.append((image, boxes))
        self.loaded = loaded
