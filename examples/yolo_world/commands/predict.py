"""Find defects on images: boxes drawn on them, and all boxes in one JSON file.

    python -m examples.yolo_world predict photo.png folder --adapter runs/screw/last.safetensors --names scratch dent
    python -m examples.yolo_world predict folder --weights W --classes classes.json --adapter A B --together

Images keep their names and folders below ``--out``; boxes are in pixels of the original images.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import convpeft

from ..data.images import SUFFIXES, DataError, read_pixels, to_square
from ..training.model import decode, use_classes
from .evaluate import choices_of
from .options import check_options, command_parser
from .report import write_json
from .session import ask_classes, load_adapters, load_base, open_session, run_command

COLOURS = ((60, 60, 230), (200, 180, 30), (40, 140, 240), (180, 90, 220), (70, 170, 60), (190, 100, 40))
"""BGR, in the order of the classes."""


@dataclasses.dataclass(frozen=True)
class Box:
    """One box: class, confidence, and x1 y1 x2 y2 in pixels of the original image, inside it."""

    label: str
    confidence: float
    xyxy: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image file, and where its picture goes below the output folder."""

    path: Path
    place: Path


def find_sources(given: Sequence[Path], *, recursive: bool = False) -> list[ImageFile]:
    """Return the image files of files and folders, in order; each goes to a place of its own.

    Raises:
        DataError: if a path is missing, is no image, or a folder holds none.
    """
    found: list[ImageFile] = []
    for path in given:
        if path.is_dir():
            entries = sorted(path.rglob("*") if recursive else path.iterdir())
            files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
            if not files:
                hint = "" if recursive else "; --recursive looks into its folders"
                raise DataError(f"{path} holds no image ({', '.join(SUFFIXES)}){hint}.")
            found += [ImageFile(file, file.relative_to(path)) for file in files]
        elif not path.is_file():
            raise DataError(f"{path} is not there; give image files or folders of them.")
        elif path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is no image that can be read here ({', '.join(SUFFIXES)}).")
        else:
            found.append(ImageFile(path, Path(path.name)))
    return own_places(found)


def own_places(sources: Sequence[ImageFile]) -> list[ImageFile]:
    """Return each file once, with a number in its place's name where another file already has that place."""
    places: set[Path] = set()
    files: set[Path] = set()
    result: list[ImageFile] = []
    for source in sources:
        if source.path.resolve() in files:
            continue
        place, number = source.place.with_suffix(".png"), 1
        while place in places:
            number += 1
            place = source.place.with_name(f"{source.place.stem}_{number}.png")
        places.add(place)
        files.add(source.path.resolve())
        result.append(ImageFile(source.path, place))
    return result


def find_boxes(
    model: nn.Module, pixels: np.ndarray, classes: Sequence[str], *, size: int, confidence: float, overlap: float
) -> list[Box]:
    """Return the boxes a model in eval mode finds on BGR pixels ``(height, width, 3)``, most confident first."""
    device = next(model.parameters()).device
    batch = to_square(pixels, size)[None].to(device).float() / 255
    (found,) = decode(model, batch, confidence=confidence, overlap=overlap)
    return to_boxes(found.cpu(), classes, size=size, width=pixels.shape[1], height=pixels.shape[0])


def to_boxes(found: Tensor, classes: Sequence[str], *, size: int, width: int, height: int) -> list[Box]:
    """Return ``(n, 6)`` boxes of a square of ``size`` as boxes of the original image, cut at its borders."""
    scale = torch.tensor([width, height, width, height], dtype=torch.float64) / size
    most = torch.tensor([width, height, width, height], dtype=torch.float64)
    corners = torch.minimum((found[:, :4].double() * scale).clamp(min=0), most)
    order = found[:, 4].argsort(descending=True, stable=True).tolist()
    return [
        Box(classes[int(found[i, 5])], float(found[i, 4]), tuple(corners[i].tolist()))  # type: ignore[arg-type]
        for i in order
    ]


def draw(pixels: np.ndarray, boxes: Sequence[Box], classes: Sequence[str]) -> np.ndarray:
    """Return a copy of BGR pixels with the boxes and their labels drawn on it, the most confident on top."""
    drawn = pixels.copy()
    thick = max(1, round(max(pixels.shape[:2]) / 400))
    for box in reversed(boxes):
        colour = COLOURS[list(classes).index(box.label) % len(COLOURS)]
        left, top, right, bottom = (round(value) for value in box.xyxy)
        cv2.rectangle(drawn, (left, top), (right, bottom), colour, thick)
        text, scale = f"{box.label} {box.confidence:.2f}", 0.35 + 0.1 * thick
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
        foot = max(top, height + base)
        cv2.rectangle(drawn, (left, foot - height - base), (left + width, foot), colour, -1)
        cv2.putText(drawn, text, (left, foot - base // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thick, cv2.LINE_AA)  # fmt: skip
    return drawn


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write BGR pixels as PNG; raises a DataError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels):
        raise DataError(f"{path} cannot be written; is the folder writable and the disk not full?")


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = command_parser(
        "predict",
        "Find defects on images, with the base or with adapters; writes pictures and JSON.",
        model=("adapter", "names"),
        out=Path("runs/predict"),
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    add_prediction_options(parser)
    add = parser.add_argument
    add("--together", action="store_true", help="all adapters at once (their sum), not one by one")
    add("--recursive", action="store_true", help="look into the folders of a folder as well")
    add("--no-pictures", action="store_true", help="write the JSON file only")
    return parser


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to look for and which boxes to keep."""
    add = parser.add_argument_group("prediction").add_argument
    add("--confidence", type=float, default=0.25, help="boxes below it are left out (default 0.25)")
    add("--overlap", type=float, default=0.6, help="of two boxes above this overlap (IoU) one stays (default 0.6)")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    args = check_options(parser, parser.parse_args(arguments))
    for name in ("confidence", "overlap"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name} must lie between 0 and 1")
    return args


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what its JSON file holds."""
    sources = find_sources(args.sources, recursive=args.recursive)
    session = open_session(args)
    classes, features = ask_classes(args, session)
    model = load_base(args, features, session).model
    names = load_adapters(model, args.adapter)
    use_classes(model, features.of(classes)).eval()
    choices = choices_of(names, args.together) or {"base": ()}
    images: list[dict[str, Any]] = []
    for source in tqdm(sources, desc="predict", unit="image"):
        pixels = read_pixels(source.path, cv2.IMREAD_COLOR)
        entry: dict[str, Any] = {
            "image": str(source.path),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "boxes": {},
        }
        for number, (title, active) in enumerate(choices.items()):
            if names:
                convpeft.set_active(model, active)
            boxes = find_boxes(model, pixels, classes, size=args.image_size, confidence=args.confidence, overlap=args.overlap)  # fmt: skip
            entry["boxes"][title] = [dataclasses.asdict(box) for box in boxes]
            if not args.no_pictures:
                folder = args.out / safe_name(title, number) if len(choices) > 1 else args.out
                write_picture(folder / source.place, draw(pixels, boxes, classes))
        images.append(entry)
    results = {"classes": classes, "models": list(choices), "texts": features.source, "confidence": args.confidence,
               "images": images}  # fmt: skip
    write_json(args.out / "predictions.json", results)
    counts = {title: sum(len(entry["boxes"][title]) for entry in images) for title in choices}
    session.say(
        f"{len(images)} images; boxes: {', '.join(f'{t} {n}' for t, n in counts.items())}; written to {args.out}"
    )
    return results


def safe_name(title: str, number: int) -> str:
    """Return a title as the name of a folder; the number tells two apart that would be the same."""
    kept = "".join(letter if letter.isalnum() or letter in "-_+" else "_" for letter in title)
    return kept if kept == title else f"{kept}_{number}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)
