"""Give an adapter that is in a model the values of a file, in place: what trainers do when they resume, or load the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterFileError, StateError, shortened
from ..files.header import inspect_adapter
from ..files.loading import load_adapter
from ..hosts.model import AdaptedModel
from ..hosts.slots import SLOT
from ..hosts.trials import deep_copy
from ..injection.inject import eject

KEY = "convpeft"  # in a checkpoint of Lightning or mmengine: the bytes of the adapter file


def restore_adapter(model: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Give the active adapter of a model the values of a file, in place: its parameters stay the same objects.

    An optimizer, an average or a wrapper that holds them goes on holding them. The file is first loaded into a copy, with
    all that ``load_adapter`` checks.

    Args:
        model: with one active adapter, made by the spec of the one in the file.
        path: of the adapter file.
        name: of the adapter in the model; unset, the active one.

    Raises:
        StateError: if it is not the active one, and the only one that is.
        AdapterFileError, BaseMismatch: if the file is damaged, is for another base, or has other layers than the adapter here.
    """
    adapted = AdaptedModel.of(model)
    name = adapted.state.active[0] if name is None and adapted.state.active else name
    if name is None or adapted.state.active != (name,):
        raise StateError(
            f"the values of {path} are for one active adapter, and active are: {', '.join(adapted.state.active) or 'none'}. "
            "convpeft.set_active(model, name) first; the model is unchanged"
        )
    file, record = inspect_adapter(path), adapted.record(name)
    if (file.layers, set(file.owned), file.norm) != (record.layers, set(record.owned), record.norm):
        unlike = [key for key in {**file.layers, **record.layers} if file.layers.get(key) != record.layers.get(key)]
        unlike += sorted(set(file.owned) ^ set(record.owned))
        raise AdapterFileError(
            f"{path} has another adapter than {name!r} here: {shortened(unlike or ['norm'])} differ. Inject with the spec that it was "
            "trained with; the model is unchanged"
        )
    twin = eject(deep_copy(adapted.root))
    load_adapter(twin, path, name=name)
    there = twin.state_dict(keep_vars=True)
    here = {key: tensor for key, tensor in adapted.root.state_dict(keep_vars=True).items() if key in there}
    own = f".{SLOT}.{name}."
    lost = [key for key in there if own in f".{key}" and key not in here]
    if lost:
        raise AdapterFileError(f"{path}: no place here for {shortened(lost)}; the model is unchanged")
    with torch.no_grad():
        for key, tensor in here.items():
            tensor.copy_(there[key])


def adapter_of(checkpoint: Any, path: str | Path) -> Path:
    """Write the adapter file that is in a checkpoint of Lightning or mmengine, and return its path.

    Args:
        checkpoint: the path of a ``.ckpt`` or ``.pth`` file, or what ``torch.load`` gives of it.
        path: of the adapter file.

    Raises:
        AdapterFileError: if there is none in it.
    """
    if isinstance(checkpoint, (str, Path)):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    content = checkpoint.get(KEY)
    if not isinstance(content, bytes):
        raise AdapterFileError(
            "this checkpoint has no adapter file: it was not written with convpeft.integrations.lightning.callback, nor with the "
            "ConvPeftHook of convpeft.integrations.mmengine"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
