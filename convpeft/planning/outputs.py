"""The channels of modules' outputs, observed: a copy runs on inputs of several sizes, and the channels' axis is the one that stays.

A copy of the whole model runs first, on the user's example inputs or on a generic image. What that leaves open is tried on
a copy of the block alone, with inputs made for its first layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import SpecError
from ..hosts.modules import base_class, base_modules, device_and_dtype
from .contracts import OutputShape, contract, declared, last_step
from .copies import layers_noted, quiet_copy, undisturbed
from .examples import ExampleFailed, call_example
from .lone_blocks import probe_alone
from .shapes import Seen, Verdict, look, settle

_IMAGE, _OTHER_IMAGES = (1, 3, 64, 64), ((1, 3, 32, 96), (1, 3, 128, 192))


@dataclass(frozen=True)
class Asked:
    """A module whose output's channels are wanted.

    Attributes:
        name, module: of the user's.
        entry: of its output, or None for the output itself.
        channels: that a rule says it has, or None.
    """

    name: str
    module: nn.Module
    entry: int | str | None
    channels: int | None


def known_output(module: nn.Module) -> Verdict | None:
    """Return the channels of a module's output if a single layer tells them: by its contract, or run alone; else None."""
    step = last_step(module)
    shape = contract(step)
    if shape is not None:
        return Verdict(shape)
    if len(base_modules(step)) > 1 or isinstance(step, nn.GroupNorm):
        return None
    alone = probe_alone(step, None, every_layout=True)
    if alone.found:
        return alone
    shape = declared(step)
    return None if shape is None else Verdict(shape)


def observed_outputs(root: nn.Module, asked: Sequence[Asked], example: Any) -> dict[str, Verdict]:
    """Return what running copies tells of the modules' outputs, by name; the model is not touched.

    Args:
        root: the user's model.
        asked: the modules to look at.
        example: example inputs, see ``call_example``; None tries a generic image.

    Raises:
        SpecError: if the model does not run on the user's own example.
    """
    if example is None and all(each.channels is not None for each in asked):
        seen: dict[str, list[Seen]] = {}  # the rules say what a run of the whole model would
    else:
        seen = _Run(root, asked).seen(example)
    return {each.name: _verdict(each, seen.get(each.name, []), example) for each in asked}


def _verdict(asked: Asked, seen: list[Seen], example: Any) -> Verdict:
    found = settle(seen, asked.channels)
    if found.found:
        return found
    alone = probe_alone(asked.module, asked.entry)
    if alone.shape is not None and seen and not alone.shape_fits(seen[0].shape):
        alone = Verdict()
    if alone.found and (asked.channels is None or alone.shape is None or asked.channels == alone.shape.channels):
        return alone
    if asked.channels is not None and example is None:
        return Verdict(OutputShape(asked.channels, False))
    shape = declared(last_step(asked.module)) if asked.entry is None else None
    if shape is not None and not seen:
        return Verdict(shape)
    return Verdict(unclear=found.unclear or alone.unclear)


class _Run:
    """Runs of one copy of a model, and what they show of some of its modules."""

    def __init__(self, root: nn.Module, asked: Sequence[Asked]) -> None:
        self.root, self.asked = root, asked
        self.device, self.dtype = device_and_dtype(root)

    def seen(self, example: Any) -> dict[str, list[Seen]]:
        """Return what the modules returned, one entry for each run; at most two runs, and none where the copy fails."""
        try:
            copy = quiet_copy(self.root)
        except Exception as error:
            if example is not None:
                raise SpecError(self._failed(f"no copy of it can be made, {error}")) from error
            return {}
        if example is None:
            first = self._try(copy, self._image(_IMAGE))
            others: Iterable[Any] = (self._image(shape) for shape in _OTHER_IMAGES)
        else:
            try:
                first = self._once(copy, example)
            except ExampleFailed as failed:
                raise SpecError(self._failed(f"it failed on the example inputs: {failed}")) from failed.__cause__
            others = larger(example)
        if first is None:
            return {}
        found = {name: [each] for name, each in first.items()}
        if all(settle(each, None).found for each in found.values()):
            return found
        second = next(filter(None, (self._try(copy, each) for each in others)), {})
        for name, each in second.items():
            found.setdefault(name, []).append(each)
        return found

    def _image(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def _failed(self, why: str) -> str:
        return (
            f"cannot plan for this {base_class(self.root).__name__}: {why}. example_inputs is a tensor, a tuple of positional "
            "inputs, a dict of keyword arguments, or a list, for a model that takes a list of images; the model is unchanged."
        )

    def _try(self, copy: nn.Module, example: Any) -> dict[str, Seen] | None:
        try:
            return self._once(copy, example)
        except ExampleFailed:
            return None

    def _once(self, copy: nn.Module, example: Any) -> dict[str, Seen]:
        """Return what each module returned on its first call in one run."""
        seen: dict[str, Seen] = {}
        with layers_noted(copy) as latest:

            def note(asked: Asked) -> Any:
                def hook(module: nn.Module, args: Any, output: Any) -> None:
                    if asked.name not in seen:
                        seen[asked.name] = look(output, asked.entry, latest)

                return hook

            modules = dict(base_modules(copy))
            handles = [modules[each.name].register_forward_hook(note(each)) for each in self.asked]
            try:
                with undisturbed(self.device):
                    call_example(copy, example)
            finally:
                for handle in handles:
                    handle.remove()
        return seen


def larger(example: Any) -> list[Any]:
    """Return example inputs of other sizes: with larger images in them, then with longer sequences.

    Tensors are padded as far as they have the height and width of an image, so that masks go along. What is no image
    fails, or is the other kind of sequence: channels first, then channels last.
    """
    leaves = [leaf for leaf in tree_flatten(example)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    images = {tuple(leaf.shape[-2:]) for leaf in leaves if leaf.ndim in (3, 4)}
    sequences = {tuple(leaf.shape[-2:]) for leaf in leaves if leaf.ndim == 3}

    def padded(sizes: set[tuple[int, ...]], width: int, height: int) -> Any:
        def pad(leaf: Any) -> Any:
            fits = isinstance(leaf, Tensor) and leaf.ndim > 1 and tuple(leaf.shape[-2:]) in sizes
            return F.pad(leaf, (0, width, 0, height)) if fits else leaf

        return tree_map(pad, example)

    return [padded(images, 32, 64), *(padded(sequences, *more) for more in ((32, 0), (0, 32)) if sequences)]
