"""Random changes of an image and its boxes, by torchvision's v2 transforms on tv_tensors.

What is drawn depends on a key alone, never on what was drawn before. ``stream.Stream`` makes the key from seed, epoch
and image, so a run that was killed goes on with the very images it would have seen, on any number of workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as change

PROBABILITIES = ("flip_x", "flip_y", "quarter_turn")
LIMITS = {"degrees": 180.0, "translate": 1.0, "scale": 1.0, "shear": 45.0,
          "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}  # fmt: skip
"""Largest strength of each change; scale must stay below its limit."""

HELP = {
    "flip_x": "probability of left for right",
    "flip_y": "probability of top for bottom",
    "quarter_turn": "probability of a turn by 90 degrees, for parts that lie any way round",
    "degrees": "turn by up to so many degrees either way",
    "translate": "shift by up to this share of the image on each axis",
    "scale": "zoom by a factor from 1 - this to 1 + this",
    "shear": "shear by up to so many degrees on each axis",
    "brightness": "factor from 1 - this to 1 + this",
    "contrast": "factor from 1 - this to 1 + this",
    "saturation": "factor from 1 - this to 1 + this",
    "hue": "shift by up to this share of the colour circle",
    "min_visible": "share of a box that must still be inside the image, else the box is dropped",
}


@dataclasses.dataclass(frozen=True)
class Strengths:
    """How much is changed; ``HELP`` says what each number means.

    Args:
        min_side: shortest side, in pixels, of a box that was cut and is kept.
        fill: grey, in [0, 1], of what lies outside the old image.

    Raises:
        ValueError: if a number is out of its range; the text names each.
    """

    flip_x: float = 0.5
    flip_y: float = 0.5
    quarter_turn: float = 0.0
    degrees: float = 5.0
    translate: float = 0.1
    scale: float = 0.2
    shear: float = 2.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02
    min_visible: float = 0.3
    min_side: float = 2.0
    fill: float = 114 / 255

    def __post_init__(self) -> None:
        limits = {**dict.fromkeys((*PROBABILITIES, "min_visible", "fill"), 1.0), **LIMITS, "min_side": math.inf}
        wrong = [
            f"{name} is {getattr(self, name):g}, it must lie between 0 and {limit:g}"
            for name, limit in limits.items()
            if not 0 <= getattr(self, name) <= limit
        ]
        if self.scale == 1:
            wrong.append("scale is 1, it must lie below 1: the image would shrink to nothing")
        if wrong:
            raise ValueError(f"augmentation: {'; '.join(wrong)}.")

    def times(self, factor: float) -> Strengths:
        """Return strengths with every change weaker or stronger by a factor, within its limit; 0 changes nothing.

        Example:
            >>> Strengths().times(0).flip_x, Strengths().times(2).degrees, Strengths().times(9).flip_x
            (0.0, 10.0, 1.0)
        """
        limits = {**dict.fromkeys(PROBABILITIES, 1.0), **LIMITS, "scale": 0.9}
        return dataclasses.replace(
            self, **{name: min(getattr(self, name) * factor, limit) for name, limit in limits.items()}
        )


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Flips, a quarter turn, an affine map and colour jitter; boxes follow, and those that leave the image go.

    A box becomes the upright box around its turned corners, so a large ``degrees`` makes boxes looser.
    """

    strengths: Strengths = dataclasses.field(default_factory=Strengths)

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the changed image with the boxes that are left and their labels.

        Args:
            image: float ``(3, size, size)`` in [0, 1].
            boxes: ``(n, 4)`` centre-x centre-y width height in [0, 1].
            labels: ``(n,)``.
            key: decides all that is drawn; from 0 to 2^63 - 1.
        """
        generator = torch.Generator().manual_seed(key)
        image, corners = self.move(image, boxes, generator)
        image = self.recolour(image, generator)
        kept, boxes = clip(corners, tuple(image.shape[-2:]), self.strengths)
        return image, boxes, labels[kept]

    def move(self, image: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the image moved, and the boxes alike: x1 y1 x2 y2 in pixels, not yet cut at the border."""
        strengths, (height, width) = self.strengths, image.shape[-2:]
        flip_x, flip_y, turn = torch.rand(3, generator=generator).tolist()
        angle, across, down, zoom, shear_x, shear_y = uniform(6, generator)
        scaled = boxes.double() * torch.tensor([width, height, width, height])
        # On a canvas of nine by nine images, this one in the middle, nothing reaches the border, where boxes are cut.
        wide = tv_tensors.BoundingBoxes(
            torch.cat([scaled[:, :2] - scaled[:, 2:] / 2, scaled[:, :2] + scaled[:, 2:] / 2], 1)
            + 4 * torch.tensor([width, height, width, height]),
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=(9 * height, 9 * width),
        )
        if flip_x < strengths.flip_x:
            image, wide = change.horizontal_flip(image), change.horizontal_flip(wide)
        if flip_y < strengths.flip_y:
            image, wide = change.vertical_flip(image), change.vertical_flip(wide)
        if turn < strengths.quarter_turn:
            image, wide = change.rotate(image, 90.0, expand=True), change.rotate(wide, 90.0, expand=True)
        degrees, shear = angle * strengths.degrees, [shear_x * strengths.shear, shear_y * strengths.shear]
        shift = [round(across * strengths.translate * width), round(down * strengths.translate * height)]
        factor = 1 + zoom * strengths.scale
        if degrees or any(shear) or any(shift) or factor != 1:
            image = change.affine(
                image, degrees, shift, factor, shear, InterpolationMode.BILINEAR, [strengths.fill] * 3
            )  # fmt: skip
            wide = change.affine(wide, degrees, shift, factor, shear)
        height, width = image.shape[-2:]
        return image, wide.as_subclass(Tensor) - 4 * torch.tensor([width, height, width, height])

    def recolour(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return the image relit, in a random order of the four changes."""
        strengths, drawn = self.strengths, uniform(4, generator)
        changes = (
            (change.adjust_brightness, 1 + drawn[0] * strengths.brightness, strengths.brightness),
            (change.adjust_contrast, 1 + drawn[1] * strengths.contrast, strengths.contrast),
            (change.adjust_saturation, 1 + drawn[2] * strengths.saturation, strengths.saturation),
            (change.adjust_hue, drawn[3] * strengths.hue, strengths.hue),
        )
        for place in torch.randperm(4, generator=generator).tolist():
            adjust, value, strength = changes[place]
            if strength:
                image = adjust(image, value)
        return image.clamp(0, 1)


def flip_and_relight(image: Tensor, boxes: Tensor, labels: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image flipped, turned over its diagonal and relit, with its boxes and labels: cheap, and loses no box.

    What the base and the demo train with; the arguments are those of ``Augmentation``.
    """
    generator = torch.Generator().manual_seed(key)
    flip_x, flip_y, transpose = (torch.rand(3, generator=generator) < 0.5).tolist()
    boxes = boxes.clone()
    if flip_x:
        image, boxes[:, 0] = image.flip(2), 1 - boxes[:, 0]
    if flip_y:
        image, boxes[:, 1] = image.flip(1), 1 - boxes[:, 1]
    if transpose:
        image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
    gain = 1 + 0.4 * (torch.rand(1, generator=generator) - 0.5)
    shift = 0.1 * (torch.rand(3, 1, 1, generator=generator) - 0.5)
    return (image * gain + shift).clamp(0, 1), boxes, labels


def uniform(count: int, generator: torch.Generator) -> list[float]:
    """Return so many numbers between -1 and 1."""
    drawn: list[float] = (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1).tolist()
    return drawn


def clip(corners: Tensor, canvas: tuple[int, int], strengths: Strengths) -> tuple[Tensor, Tensor]:
    """Return which boxes are kept, bool ``(n,)``, and those, cut at the border, as ``(kept, 4)`` centre size in [0, 1].

    Args:
        corners: x1 y1 x2 y2 in pixels, possibly outside.
        canvas: height and width of the image.
        strengths: says which share of a box must be inside, and its shortest side.
    """
    whole = tv_tensors.BoundingBoxes(corners, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=canvas)
    inside = change.clamp_bounding_boxes(whole).as_subclass(Tensor)
    sides, before = inside[:, 2:] - inside[:, :2], corners[:, 2:] - corners[:, :2]
    share = sides.prod(1) / before.prod(1).clamp(min=1e-12)
    long_enough = (sides >= before.clamp(max=strengths.min_side) - 1e-9).all(1)
    kept = (share >= strengths.min_visible - 1e-9) & (sides > 0).all(1) & long_enough
    inside, sides = inside[kept], sides[kept]
    centred = torch.cat([inside[:, :2] + sides / 2, sides], 1)
    return kept, (centred / torch.tensor([canvas[1], canvas[0]] * 2)).float()


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--augment FACTOR`` and one option per strength, for ``augmentation_of``."""
    add = parser.add_argument_group("augmentation of the training images").add_argument
    add("--augment", type=float, default=1.0, metavar="FACTOR",
        help="multiplies every strength below that is not given; 0 leaves the images as they are (default 1)")  # fmt: skip
    for name, text in HELP.items():
        default = getattr(Strengths, name)
        add(f"--augment-{name.replace('_', '-')}", type=float, metavar="X", help=f"{text} (default {default:g})")


def augmentation_of(args: argparse.Namespace) -> Augmentation | None:
    """Return the augmentation that the options ask for, or None if it would change nothing.

    Raises:
        ValueError: if a strength is out of its range.
    """
    if not 0 <= args.augment < math.inf:
        raise ValueError(f"augmentation: --augment is {args.augment:g}, it must be 0 or more.")
    named = {name: getattr(args, f"augment_{name}") for name in HELP}
    given = {name: value for name, value in named.items() if value is not None}
    strengths = dataclasses.replace(Strengths().times(args.augment), **given)
    if not any(getattr(strengths, name) for name in (*PROBABILITIES, *LIMITS)):
        return None
    return Augmentation(strengths)
