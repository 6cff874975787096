"""What every data source becomes: images in memory or read when asked for, with boxes and class indices."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
MEMORY = 2 * 1024**3
Batch = dict[str, Tensor]
Augment = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
"""``(image in [0, 1], boxes, labels, key) -> (image, boxes, labels)``; the key alone decides what is drawn."""


class DataError(ValueError):
    """A data folder or file that cannot be read: says which path, what is wrong, and what to do."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image file with its boxes.

    Args:
        image: the file.
        width, height: its size in pixels, as it is shown (turned as its EXIF entry says).
        boxes: x1 y1 x2 y2 in pixels, inside the image.
        labels: class index of each box.
        defect: name of the first box's class; None for an image without boxes.
        name: what the data call the file; the split goes by it, so that it is the same wherever the folder lies.
    """

    image: Path
    width: int
    height: int
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    defect: str | None = None
    name: str = ""


def images_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted by name; empty if the folder is not there."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def read_pixels(path: Path, flag: int) -> np.ndarray:
    """Return an image file's pixels.

    Raises:
        DataError: if the file is missing or cannot be decoded.
    """
    pixels = cv2.imread(str(path), flag)
    if pixels is None:
        why = "cannot be decoded; it may be cut off or no image" if path.is_file() else "is not there"
        raise DataError(f"{path} {why}.")
    return pixels


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file as it is shown, from its header alone.

    Raises:
        DataError: if the file is missing or its header cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise DataError(f"{path} is not there.")
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(0x0112, 1)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, ImportError) as error:
        # ImportError: ultralytics replaces Image.open by one that asks for pi-heif where it cannot tell what the file is
        raise DataError(f"{path} cannot be decoded; it may be cut off or no image.") from error
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def to_square(pixels: np.ndarray, size: int) -> Tensor:
    """Return BGR pixels ``(height, width, 3)`` as a uint8 RGB tensor ``(3, size, size)``; the aspect is not kept."""
    resized = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(np.ascontiguousarray(resized[..., ::-1].transpose(2, 0, 1)))


def to_centred(boxes: np.ndarray, width: int, height: int) -> Tensor:
    """Return boxes in pixels, x1 y1 x2 y2 ``(n, 4)``, as centre-x centre-y width height in [0, 1], float32."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) / [width, height, width, height]
    return torch.from_numpy(np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)).float()


def split_by_hash(paths: Sequence[Path], share: float, seed: int, root: Path) -> tuple[list[Path], list[Path]]:
    """Return the paths as (train, test), ordered by a hash of seed and path relative to ``root``.

    With two paths or more both sides have at least one; a single path goes to train.
    """
    keys = {path: hashlib.sha256(f"{seed}:{path.relative_to(root).as_posix()}".encode()).digest() for path in paths}
    ordered = sorted(paths, key=keys.__getitem__)
    cut = round(share * len(ordered))
    cut = min(max(cut, 1), len(ordered) - 1) if len(ordered) > 1 else len(ordered)
    return sorted(ordered[:cut]), sorted(ordered[cut:])


class DetectionImages(Dataset[dict[str, Tensor]]):
    """Images with boxes and class indices, as ``{img, cls, bboxes}``: what training and evaluation take.

    Attributes:
        samples: one entry per image, with its path in ``image`` and the name of its (first) class in ``defect``.
        left_out: entries that were given but are not used.
        loaded: for each image uint8 ``(3, size, size)`` RGB, and boxes ``(n, 4)`` centre-x centre-y w h in [0, 1].
        boxes, labels: the boxes and the class index, int64 ``(n,)``, of each image, without reading any.
        classes: class names in the order of the text features.
        size: height and width of the images.
        augmentation: changes an item; its key is drawn from torch's global random numbers, so whoever seeds those
            by seed, epoch and index (``stream.Stream``) gets the same item whatever came before.
    """

    samples: list[Any]
    left_out: list[Any]
    loaded: Sequence[tuple[Tensor, Tensor]]
    boxes: list[Tensor]
    labels: list[Tensor]
    classes: tuple[str, ...]
    size: int
    augmentation: Augment | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels, boxes = self.loaded[index]
        image, labels = pixels.float() / 255, self.labels[index]
        if self.augmentation is not None:
            key = int(torch.randint(2**62, ()))
            image, boxes, labels = self.augmentation(image, boxes, labels, key)
        return {"img": image, "bboxes": boxes, "cls": labels.float()[:, None]}


class Held(Sequence[tuple[Tensor, Tensor]]):
    """Images that are read when first asked for, and kept until they fill the memory they may have.

    Args:
        pictures: what to read.
        boxes: goes with each image.
        size: height and width the images are resized to.
        memory: bytes of pixels that are kept; what does not fit is read anew each time.
    """

    def __init__(self, pictures: Sequence[Picture], boxes: Sequence[Tensor], size: int, memory: int) -> None:
        self.pictures, self.boxes, self.size = pictures, boxes, size
        self.room = memory // (3 * size * size)
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        pixels = self.kept.get(place)
        if pixels is None:
            pixels = self.read(self.pictures[place])
            if len(self.kept) < self.room:
                self.kept[place] = pixels
        return pixels, self.boxes[place]

    def read(self, picture: Picture) -> Tensor:
        """Return the image from its file.

        Raises:
            DataError: if it cannot be read, or does not have the size that its boxes were checked against.
        """
        pixels = read_pixels(picture.image, cv2.IMREAD_COLOR)
        height, width = pixels.shape[:2]
        if (width, height) != (picture.width, picture.height):
            raise DataError(
                f"{picture.image} is {width}x{height}, its boxes belong to {picture.width}x{picture.height}."
            )
        return to_square(pixels, self.size)


class PictureImages(DetectionImages):
    """The data set of some pictures; the files are read when first asked for.

    Args:
        pictures: images with their boxes.
        classes: class names in the order of the text features.
        size: height and width the images are resized to (a multiple of 32).
        augmentation: see ``DetectionImages``; None changes nothing.
        left_out: pictures that are not used, for the record.
        memory: bytes of pixels that are kept.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        classes: Sequence[str],
        *,
        size: int,
        augmentation: Augment | None = None,
        left_out: Sequence[Picture] = (),
        memory: int = MEMORY,
    ) -> None:
        self.samples, self.left_out = list(pictures), list(left_out)
        self.classes, self.size, self.augmentation = tuple(classes), size, augmentation
        self.boxes = [to_centred(np.array(p.boxes), p.width, p.height) for p in pictures]
        self.labels = [torch.tensor(p.labels, dtype=torch.int64) for p in pictures]
        self.loaded = Held(self.samples, self.boxes, size, memory)


@dataclasses.dataclass(frozen=True)
class Collate:
    """Join items to the batch that ultralytics' losses want; ``texts`` are the classes' features, ``(1, nc, 512)``."""

    texts: Tensor

    def __call__(self, items: Sequence[dict[str, Any]]) -> Batch:
        """Return the batch; ``batch_idx`` says for each box which image it is on."""
        counts = torch.tensor([len(item["cls"]) for item in items])
        return {
            "img": torch.stack([item["img"] for item in items]),
            "cls": torch.cat([item["cls"] for item in items]),
            "bboxes": torch.cat([item["bboxes"] for item in items]),
            "batch_idx": torch.repeat_interleave(torch.arange(len(items)), counts).float(),
            "txt_feats": self.texts.expand(len(items), -1, -1).contiguous(),
        }
