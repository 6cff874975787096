"""Procedural surfaces: what a *generated* category looks like without a defect.

Each surface is a function ``(rng, size) -> (image, part)``: a float32 RGB image in [0, 1] of shape
``(size, size, 3)`` and a boolean mask of the same size that is True where a defect may lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

Array = np.ndarray
Draw = Callable[[np.random.Generator, int], tuple[Array, Array]]
Colour = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Surface:
    """One generated category: how it is drawn, and how defects look on it.

    Args:
        draw: makes the image and the mask of places where a defect may lie.
        scratch: change of brightness along a scratch; negative is darker than the surface.
        stain: colour that a stain pulls the surface to.
        beneath: colour that shows where a part is missing.
    """

    draw: Draw
    scratch: float
    stain: Colour
    beneath: Colour


def smooth_noise(rng: np.random.Generator, size: int, *, across: float, along: float) -> Array:
    """Return noise of shape ``(size, size)`` with mean 0 and deviation 1, blurred by the two scales in pixels.

    ``across`` is the blur from row to row and ``along`` the blur within a row; 0 leaves an axis sharp.
    """
    noise = rng.standard_normal((size, size)).astype(np.float32)
    noise = cv2.GaussianBlur(
        noise, (0, 0), sigmaX=max(along, 0.1), sigmaY=max(across, 0.1), borderType=cv2.BORDER_REFLECT_101
    )
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def grid(size: int) -> tuple[Array, Array]:
    """Return the row and the column coordinate of each pixel, both float32 of shape ``(size, size)``."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    return rows, columns


def tint(grey: Array, colour: Colour, rng: np.random.Generator) -> Array:
    """Return an RGB image: ``grey`` times a slightly jittered ``colour``, lit unevenly from one side."""
    size = grey.shape[0]
    rows, columns = grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * rows + np.sin(angle) * columns) / size
    light = 1 + rng.uniform(0.0, 0.2) * (slope - slope.mean())
    jittered = np.asarray(colour) * rng.uniform(0.9, 1.1, 3)
    image = (grey * light)[..., None] * jittered * rng.uniform(0.9, 1.08)
    return np.clip(image, 0, 1).astype(np.float32)


def everywhere(size: int) -> Array:
    """Return a mask that allows a defect on the whole image."""
    return np.ones((size, size), bool)


def turn(image: Array, rng: np.random.Generator) -> Array:
    """Return the image turned by a random multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, k=int(rng.integers(4))))


def metal(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw brushed metal: fine streaks in one direction."""
    grey = (
        0.62
        + 0.05 * smooth_noise(rng, size, across=0.4, along=30)
        + 0.02 * smooth_noise(rng, size, across=20, along=20)
    )
    return turn(tint(grey, (0.95, 1.0, 1.05), rng), rng), everywhere(size)


def fabric(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw woven cloth: warp and weft threads that cross over and under."""
    rows, columns = grid(size)
    pitch = rng.uniform(5, 8)
    warp, weft = np.sin(2 * np.pi * columns / pitch), np.sin(2 * np.pi * rows / pitch)
    over = np.sign(np.sin(np.pi * columns / pitch) * np.sin(np.pi * rows / pitch))
    grey = 0.52 + 0.07 * np.where(over > 0, warp, weft) + 0.03 * smooth_noise(rng, size, across=1, along=1)
    return tint(grey, (0.75, 0.9, 1.15), rng), everywhere(size)


def wood(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw wood: growth rings bent by slow noise, and fine grain."""
    rows, _ = grid(size)
    bend = 14 * smooth_noise(rng, size, across=18, along=60)
    rings = np.sin(2 * np.pi * (rows + bend) / rng.uniform(14, 24))
    grey = 0.58 + 0.06 * rings + 0.03 * smooth_noise(rng, size, across=0.5, along=12)
    return turn(tint(grey, (1.2, 0.9, 0.6), rng), rng), everywhere(size)


def leather(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw leather: a pebbled relief of small cells."""
    relief = smooth_noise(rng, size, across=2.2, along=2.2)
    grey = 0.42 + 0.05 * np.abs(relief) + 0.02 * smooth_noise(rng, size, across=25, along=25)
    return tint(grey, (1.15, 0.75, 0.6), rng), everywhere(size)


def stone(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw cast stone: grains of several sizes on grey."""
    grains = smooth_noise(rng, size, across=0.7, along=0.7) + smooth_noise(rng, size, across=3, along=3)
    grey = 0.6 + 0.035 * grains + 0.03 * smooth_noise(rng, size, across=30, along=30)
    return tint(grey, (1.0, 1.0, 0.95), rng), everywhere(size)


def tile(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw a glazed mosaic: tiles of varied tone between bright grout lines."""
    rows, columns = grid(size)
    pitch, joint = rng.uniform(30, 44), rng.uniform(2, 3.5)
    down, right = rows + rng.uniform(0, pitch), columns + rng.uniform(0, pitch)
    tones = rng.uniform(-0.06, 0.06, (64, 64))
    grey = 0.34 + tones[(down // pitch).astype(int), (right // pitch).astype(int)]
    grey = grey + 0.02 * smooth_noise(rng, size, across=6, along=6)
    grout = (down % pitch < joint) | (right % pitch < joint)
    image = tint(grey.astype(np.float32), (0.7, 1.1, 1.2), rng)
    image[grout] = rng.uniform(0.75, 0.85) + 0.03 * rng.standard_normal((int(grout.sum()), 1))
    return np.clip(image, 0, 1).astype(np.float32), everywhere(size)


def mesh(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw a wire mesh: two families of bright wires over a dark ground."""
    rows, columns = grid(size)
    pitch, wire = rng.uniform(13, 18), rng.uniform(0.28, 0.36)
    angle = rng.uniform(0.15, 0.75)
    first = (np.cos(angle) * columns + np.sin(angle) * rows) / pitch
    second = (-np.sin(angle) * columns + np.cos(angle) * rows) / pitch
    height = np.maximum(np.abs(first % 1 - 0.5), np.abs(second % 1 - 0.5))
    wires = np.clip((height - (0.5 - wire / 2)) * 2 / wire, 0, 1)
    grey = 0.14 + 0.62 * np.sqrt(wires) + 0.015 * smooth_noise(rng, size, across=1, along=1)
    return tint(grey.astype(np.float32), (1.05, 1.0, 0.8), rng), everywhere(size)


def washer(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Draw a round part with a hole, lying on a ribbed belt; defects lie on the part."""
    rows, columns = grid(size)
    belt = 0.22 + 0.06 * np.sign(np.sin(2 * np.pi * rows / rng.uniform(10, 16)))
    belt = belt + 0.02 * smooth_noise(rng, size, across=1, along=1)
    image = turn(tint(belt.astype(np.float32), (0.8, 1.15, 0.85), rng), rng)
    middle = size / 2 + rng.uniform(-0.06, 0.06, 2) * size
    radius = np.hypot(rows - middle[0], columns - middle[1]) / size
    outer, inner = rng.uniform(0.38, 0.43), rng.uniform(0.09, 0.12)
    part = (radius < outer) & (radius > inner)
    turned = (
        0.72
        + 0.05 * np.sin(2 * np.pi * radius * rng.uniform(45, 70))
        + 0.02 * smooth_noise(rng, size, across=2, along=2)
    )
    bevel = np.clip((outer - radius) / 0.02, 0, 1) * 0.25 + 0.75
    face = tint((turned * bevel).astype(np.float32), (1.1, 0.92, 0.55), rng)
    image[part] = face[part]
    return image, part


SURFACES: dict[str, Surface] = {
    "metal": Surface(metal, -0.30, (0.35, 0.25, 0.12), (0.08, 0.08, 0.10)),
    "fabric": Surface(fabric, 0.30, (0.20, 0.16, 0.14), (0.85, 0.82, 0.75)),
    "wood": Surface(wood, -0.30, (0.18, 0.14, 0.12), (0.12, 0.07, 0.04)),
    "leather": Surface(leather, 0.28, (0.16, 0.10, 0.08), (0.75, 0.60, 0.45)),
    "stone": Surface(stone, -0.32, (0.40, 0.30, 0.15), (0.15, 0.15, 0.15)),
    "tile": Surface(tile, 0.35, (0.75, 0.55, 0.20), (0.80, 0.78, 0.72)),
    "mesh": Surface(mesh, 0.45, (0.55, 0.25, 0.10), (0.02, 0.02, 0.03)),
    "washer": Surface(washer, -0.35, (0.15, 0.30, 0.45), (0.10, 0.14, 0.11)),
}
"""Every generated category by name. The last three are what the demo's adapters learn by default."""
