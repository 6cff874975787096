"""Write an adapter file: one safetensors file with tensors and one JSON text, in one step; no pickle, ever."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..errors import StateError
from ..hosts.buffers import own_buffers
from ..hosts.model import AdaptedModel
from ..hosts.modules import unique_modules
from ..hosts.unfrozen import check_tensors_present
from ..injection.switching import note_training
from .fingerprints import ALGORITHM, digest, fingerprint, parts, plain
from .header import ADAPTER, FORMAT, METADATA, OWN, STATE, VERSION, modules_of, seal, tensor_key
from .host_notes import notes_of
from .writing import write


def save_adapter(model: nn.Module, path: str | Path, *, name: str | None = None) -> Path:
    """Write one adapter, with every tensor it unfroze, to a safetensors file, and return the path.

    The file is written beside its final place and then moved there in one step: a crash leaves the old file. A file that
    is replaced keeps its mode, and a link stays a link. Of a model that FSDP2 shards, all processes have to call this together.

    Args:
        model: an injected model.
        path: of the file; its folder is made if need be.
        name: of the adapter; unset, the only one, or the only active one.

    Raises:
        StateError: if nothing is injected, it is not clear which adapter is meant, or a tensor of it is gone.
        AdapterFileError: if the file cannot be written.
    """
    adapted = AdaptedModel.of(model)
    name = chosen(adapted, name)
    record = adapted.record(name)
    note_training(adapted)
    check_tensors_present({key: (adapted.module(key), None) for key in record.owned})
    tensors = {key: plain(tensor) for key, tensor in _tensors(adapted, name)}
    said = {
        "name": name,
        "spec": record.spec,
        "layers": {key: layer.to_dict() for key, layer in record.layers.items()},
        "owned": record.owned,
        "norm": record.norm,
    }
    hosts = notes_of(adapted, name, modules_of(tensors, OWN, STATE))
    return write_adapter(Path(path), said, _base(adapted.root), tensors, hosts)


def write_adapter(
    path: Path,
    said: dict[str, Any],
    base: dict[str, Any],
    tensors: Mapping[str, Tensor],
    hosts: dict[str, Any] | None,
) -> Path:
    """Write an adapter file from its parts, and return the path.

    Args:
        path: of the file.
        said: name, spec, layers, owned and norm, as plain data.
        base: what it says of the base: ``layers``, and ``parts`` if there are any.
        tensors: by key in the file.
        hosts: see ``host_notes.notes_of``; None: they are not known.

    Raises:
        AdapterFileError: if the file cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        **said,
        **({} if hosts is None else {"hosts": hosts}),
        "base": {"algorithm": ALGORITHM, **base},
        "content": digest(sorted(tensors.items())),
        "torch": torch.__version__.split("+")[0],
    }
    text = json.dumps({**metadata, "seal": seal(json.loads(json.dumps(metadata)))})
    write(path, safetensors_bytes({key: tensor.clone() for key, tensor in tensors.items()}, {METADATA: text}))
    return path


def chosen(adapted: AdaptedModel, name: str | None) -> str:
    """Return the name of the adapter to save: the one asked for, the only one, or the only active one.

    Raises:
        StateError: if it is not clear which one is meant.
    """
    if name is not None:
        return name
    state = adapted.state
    names = list(state.adapters) if len(state.adapters) == 1 else list(state.active)
    if len(names) != 1:
        raise StateError(f"which adapter? Say name=..., one of: {', '.join(state.adapters)}")
    return names[0]


def _base(root: nn.Module) -> dict[str, Any]:
    """Return what a file says of the base it was made on."""
    said: dict[str, Any] = {"layers": fingerprint(root)}
    buffers = parts(root)
    return {**said, "parts": buffers} if buffers else said


def _tensors(adapted: AdaptedModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of an adapter by its key in a file."""
    for layer, adapter in adapted.adapters(name):
        for key, tensor in adapter.state_dict().items():
            yield tensor_key(ADAPTER, layer, key), tensor
    for module, own in adapted.unfrozen(name):
        for key, tensor in own.items():
            yield tensor_key(OWN, module, key), tensor
    names = {id(module): key for key, module in unique_modules(adapted.root)}
    for moved, buffers in own_buffers(adapted.root, name):
        for key, tensor in buffers.items():
            yield tensor_key(STATE, names[id(moved)], key), tensor
