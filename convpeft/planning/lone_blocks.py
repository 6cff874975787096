"""A block run alone: on inputs made for its first layer, of several sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..hosts.modules import base_class, base_modules, device_and_dtype, unique_modules
from .contracts import contract
from .copies import layers_noted, quiet_copy, undisturbed
from .shapes import Verdict, look, settle

Size = tuple[int, int, int]  # samples, height, width

_SIZES: tuple[tuple[Size, Size], ...] = (((2, 8, 12), (3, 12, 20)), ((1, 64, 96), (2, 96, 160)))
_LAYERS = 3  # the first in the block's order need not be the first that runs
_OF_WEIGHT = {5: ("volume",), 4: ("image",), 3: ("sequence",)}  # by the axes of a convolution's weight


def probe_alone(module: nn.Module, entry: int | str | None, *, every_layout: bool = False) -> Verdict:
    """Return what a copy of a block tells of its output, run alone; the block is not touched.

    A block that runs on another number of channels as well, and returns as many, does not say how many it has.

    Args:
        module: the block.
        entry: of its output, or None.
        every_layout: the answer must be the same for every kind of input that the block runs on.
    """
    try:
        copy = quiet_copy(module)
    except Exception:  # of the user's module
        return Verdict()
    probe, found = _Probe(copy, entry), Verdict()
    for channels, layouts in _inputs(copy):
        for layout in layouts:
            verdict = probe.verdict(channels, layout)
            if not verdict.found:
                found = verdict if not (found.found or found.unclear) else found
                continue
            if not every_layout:
                return verdict
            if found.found and found.shape != verdict.shape:
                return Verdict()
            found = verdict
        if found.found:
            break
    return found


class _Probe:
    """Runs one copy on made inputs."""

    def __init__(self, copy: nn.Module, entry: int | str | None) -> None:
        self.copy, self.entry = copy, entry
        self.device, self.dtype = device_and_dtype(copy)

    def verdict(self, channels: int, layout: str) -> Verdict:
        """Return what runs on two sizes tell, the small ones first."""
        found = Verdict()
        for sizes in _SIZES:
            found = self._settled(channels, layout, sizes)
            if found.found:
                other = self._settled(2 * channels, layout, sizes)
                return Verdict() if other.shape not in (None, found.shape) else found
        return found

    def _settled(self, channels: int, layout: str, sizes: tuple[Size, Size]) -> Verdict:
        seen = []
        for size in sizes:
            try:
                with undisturbed(self.device), layers_noted(self.copy) as latest:
                    x = torch.zeros(_shape(channels, layout, size), device=self.device, dtype=self.dtype)
                    output = self.copy(x, **_others(self.copy))
            except Exception:  # of the user's module, on an input that is none of theirs
                return Verdict()
            seen.append(look(output, self.entry, latest))
        if seen[0].shape[1:] != seen[1].shape[1:] and len(seen[0].shape) == 2:  # it depends on the size
            return Verdict()
        return settle(seen, None)


def _inputs(block: nn.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield channels and layouts of inputs that the block's first layers would take, the likeliest first."""
    found: list[tuple[int, tuple[str, ...]]] = []
    for _, layer in unique_modules(block):
        takes = _takes(layer)
        if takes is not None and takes not in found:
            found.append(takes)
            yield takes
            if len(found) == _LAYERS:
                return


def _takes(layer: nn.Module) -> tuple[int, tuple[str, ...]] | None:
    """Return the channels of a layer's input, and its layouts; None for a module that says nothing of it."""
    if len(base_modules(layer)) > 1:
        return None
    weight: Any = getattr(layer, "weight", None)
    channels = _count(layer, "in_channels")
    if channels:
        return channels, _OF_WEIGHT.get(getattr(weight, "ndim", 4), ("image",))
    channels = _count(layer, "in_features")
    if channels:
        return channels, ("tokens", "map", "vector", "image")
    channels = _count(layer, "num_channels")
    if channels:
        return channels, ("image", "sequence")
    channels = _count(layer, "num_features")
    if channels:
        by_class: dict[type[nn.Module], tuple[str, ...]] = {
            nn.BatchNorm1d: ("vector", "sequence"),
            nn.BatchNorm3d: ("volume",),
        }
        return channels, by_class.get(base_class(layer), ("image",))
    shape = getattr(layer, "normalized_shape", ())
    if isinstance(shape, (tuple, list)) and len(shape) == 1:
        plain = contract(layer) is not None
        return int(shape[0]), ("tokens", "map", "image") if plain else ("image", "map", "tokens")
    return None


def _count(layer: nn.Module, attribute: str) -> int:
    value = getattr(layer, attribute, 0)
    return value if isinstance(value, int) else 0


def _shape(channels: int, layout: str, size: Size) -> tuple[int, ...]:
    samples, height, width = size
    return {
        "image": (samples, channels, height, width),
        "volume": (samples, channels, 4 + samples, height, width),
        "sequence": (samples, channels, width),
        "tokens": (samples, height, channels),
        "map": (samples, height, width, channels),
        "vector": (samples, channels),
    }[layout]


def _others(block: nn.Module) -> dict[str, Any]:
    """Return None for each argument that a block needs besides its input, by name: masks and the like."""
    try:
        parameters = list(inspect.signature(base_class(block).forward).parameters.values())[2:]
    except (TypeError, ValueError, AttributeError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name: None for each in parameters if each.default is each.empty and each.kind in kinds}
