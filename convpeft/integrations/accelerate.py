"""accelerate: ``save_state`` and ``load_state`` with the adapter in the place of the whole model.

accelerate is not imported here: the hooks are the accelerator's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import StateError
from ..files.saving import save_adapter
from ..hosts.model import AdaptedModel
from ..hosts.wrappers import inside
from .restoring import restore_adapter

FILE = "adapter{}.safetensors"  # with the model's number, for the second and later ones, as accelerate numbers its own


def register(accelerator: Any, model: nn.Module) -> None:
    """Let ``accelerator.save_state`` write the active adapter of a model, and ``load_state`` give it its values back, in place.

    The base is not written. Other models that the accelerator has prepared are saved and loaded as ever. Optimizer, schedule
    and random numbers are accelerate's.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        model: with one active adapter, before or after ``accelerator.prepare``.

    Raises:
        StateError: if nothing is injected, or not exactly one adapter is active; when saving and loading, too.
    """
    root = AdaptedModel.of(model).root
    _active(root)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        for number in _numbers(models, root):
            if accelerator.is_main_process:
                save_adapter(root, Path(folder) / _file(number), name=_active(root))
            if weights:
                del weights[number]

    def load(models: list[Any], folder: str) -> None:
        for number in _numbers(models, root):
            restore_adapter(root, Path(folder) / _file(number), name=_active(root))
            del models[number]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _active(root: nn.Module) -> str:
    active = AdaptedModel.of(root).state.active
    if len(active) != 1:
        raise StateError(f"accelerate can save the one active adapter, and active are: {', '.join(active) or 'none'}")
    return active[0]


def _numbers(models: list[Any], root: nn.Module) -> list[int]:
    """Return where an accelerator's list of models has the one with adapters, if it does."""
    return [number for number, each in enumerate(models) if any(part is root for part in inside(each).modules())][:1]


def _file(number: int) -> str:
    return FILE.format("" if number == 0 else f"_{number}")
