"""Checkpoints of a training: one safetensors file, tensors and one JSON text, written in one step and read without pickle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..data.files import write_atomically

VERSION = 1
KEY = "training"
TENSOR, ITEMS = "__tensor__", "__items__"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run: says which file, what is wrong, and what to do."""


def pack(content: Any, tensors: dict[str, Tensor], full: Callable[[Tensor], Tensor], at: str = "") -> Any:
    """Return nested content as JSON can hold it; its tensors move to ``tensors``, on the CPU, under their places.

    Args:
        content: dictionaries (keys of any plain type), lists, tuples, tensors, numbers, texts, None.
        tensors: filled in place.
        full: makes a tensor whole where it is sharded.
        at: place of ``content`` in the whole.
    """
    if isinstance(content, Tensor):
        tensors[at] = full(content.detach()).cpu().contiguous().clone()
        return {TENSOR: at}
    if isinstance(content, dict):
        if all(isinstance(key, str) for key in content):
            return {key: pack(value, tensors, full, f"{at}/{key}") for key, value in content.items()}
        return {ITEMS: [[key, pack(value, tensors, full, f"{at}/{key}")] for key, value in content.items()]}
    if isinstance(content, list | tuple):
        return [pack(value, tensors, full, f"{at}/{number}") for number, value in enumerate(content)]
    return content


def unpack(content: Any, tensors: dict[str, Tensor]) -> Any:
    """Return what ``pack`` was given; tuples have become lists."""
    if isinstance(content, dict):
        if content.keys() == {TENSOR}:
            return tensors[content[TENSOR]]
        if content.keys() == {ITEMS}:
            return {key: unpack(value, tensors) for key, value in content[ITEMS]}
        return {key: unpack(value, tensors) for key, value in content.items()}
    if isinstance(content, list):
        return [unpack(value, tensors) for value in content]
    return content


def save_checkpoint(
    path: Path, content: dict[str, Any], *, full: Callable[[Tensor], Tensor] = Tensor.detach, write: bool = True
) -> None:
    """Write nested content with tensors to ``path``, atomically.

    Args:
        path: of the file.
        content: see ``pack``.
        full: makes a sharded tensor whole; all processes have to call this together then.
        write: False in the processes that only take part in that.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"version": VERSION, "content": pack(content, tensors, full)})
    if write:
        write_atomically(path, safetensors_bytes(tensors, {KEY: text}))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: if it is missing, damaged, no checkpoint, or of an unknown version.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; --resume wants the --out folder of an earlier run.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        if text is None:
            raise CheckpointError(
                f"{path} is a safetensors file, but no training checkpoint (no '{KEY}' in its metadata)."
            )
        data = json.loads(text)
        if data["version"] != VERSION:
            raise CheckpointError(f"{path} has version {data['version']}; this program reads version {VERSION}.")
        return unpack(data["content"], tensors)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Take an older checkpoint, or start anew.") from error


def copy_into(
    targets: dict[str, Tensor], values: dict[str, Tensor], put: Callable[[Tensor, Tensor], None], where: str
) -> None:
    """Copy values into live tensors by name, in place, or change nothing.

    Args:
        targets: live tensors.
        values: whole ones, with the same names and shapes.
        put: copies one into the other, which may be sharded.
        where: what the values are from, for the error.

    Raises:
        CheckpointError: if names or shapes differ.
    """
    problems = [f"{name} is missing" for name in targets if name not in values]
    problems += [f"{name} is not in this model" for name in values if name not in targets]
    problems += [
        f"{name} is {tuple(values[name].shape)}, here {tuple(target.shape)}"
        for name, target in targets.items()
        if name in values and values[name].shape != target.shape
    ]
    if problems:
        raise CheckpointError(
            f"{where} is of another adapter or model; nothing was changed. {len(problems)} tensors differ: "
            f"{'; '.join(problems[:5])}. Resume with the --spec, --scale and --classes of that run."
        )
    with torch.no_grad():
        for name, target in targets.items():
            put(target, values[name])
