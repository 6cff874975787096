"""The tensors of a base model on disk, read one at a time: safetensors, one file or shards, or what ``torch.save`` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError, brief, shortened, shown
from ..planning.parsing import strict_json
from .reading import DTYPES, Entry, OpenFile, opened

INDEX = ".safetensors.index.json"
_MOST_INDEX = 64 * 2**20  # bytes
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HOLDERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "weights",
)  # of a checkpoint's tensors beside other things


class Checkpoint:
    """The tensors of a base, where they are on disk.

    Attributes:
        path: of the file, or of the index of its shards.
        tensors: shape and dtype by key, in the order of the file.
        shards: keys by file name; one entry for a single file.
        metadata: texts by key.
    """

    path: Path
    tensors: dict[str, Entry]
    shards: dict[str, list[str]]
    metadata: dict[str, str]

    def read(self, key: str) -> Tensor:
        """Return one tensor, contiguous and on the CPU.

        Raises:
            AdapterFileError: if it cannot be read, or is of a dtype that has no name here.
        """
        raise NotImplementedError

    def chunks(self, key: str) -> Iterator[Any]:
        """Yield the bytes of one tensor, a bounded number at a time."""
        raise NotImplementedError

    def modules(self, prefix: str = "") -> dict[str, list[str]]:
        """Return the names of each module's own tensors, by module; ``prefix`` is taken off the keys that begin with it."""
        found: dict[str, list[str]] = {}
        for key in self.tensors:
            if key.startswith(prefix):
                module, _, name = key[len(prefix) :].rpartition(".")
                found.setdefault(module, []).append(name)
        return found


class _Safetensors(Checkpoint):
    def __init__(self, path: Path, files: Mapping[str, OpenFile]) -> None:
        self.path = path
        self._files = {key: file for file in files.values() for key in file.tensors}
        self.tensors = {key: file.tensors[key] for key, file in self._files.items()}
        self.shards = {name: list(file.tensors) for name, file in files.items()}
        self.metadata = next((file.metadata for file in files.values()), {})
        unnamed = [key for key, (_, dtype) in self.tensors.items() if dtype not in DTYPES]
        if unnamed:
            raise AdapterFileError(
                f"{path}: {shortened(unnamed, 4)} have a dtype that is not known here ({self.tensors[unnamed[0]][1]})"
            )

    def read(self, key: str) -> Tensor:
        return self._files[key].tensor(key)

    def chunks(self, key: str) -> Iterator[Any]:
        return self._files[key].chunks(key)


class _Pickled(Checkpoint):
    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self._tensors = path, tensors
        unnamed = [
            key for key, tensor in tensors.items() if tensor.dtype not in _NAMES or tensor.layout != torch.strided
        ]
        if unnamed:
            raise AdapterFileError(
                f"{path}: {shortened(unnamed)} have a dtype or layout ({tensors[unnamed[0]].dtype}) that safetensors files "
                "do not keep here; save the base without them"
            )
        self.tensors = {key: (tuple(tensor.shape), _NAMES[tensor.dtype]) for key, tensor in tensors.items()}
        self.shards, self.metadata = {path.name: list(tensors)}, {}

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach().contiguous()

    def chunks(self, key: str) -> Iterator[Any]:
        whole = self.read(key).reshape(-1)
        flat = whole.view(torch.uint8).numpy().data if whole.numel() else b""
        yield from (flat[start : start + OpenFile.CHUNK] for start in range(0, len(flat), OpenFile.CHUNK))


@contextmanager
def opened_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open the tensors of a base inside the context; no class of a model is imported, and nothing is unpickled but tensors.

    Args:
        path: of a ``.safetensors`` file, of an index of shards (``*.safetensors.index.json``) or the folder of one, or of a
            ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file, which is read with ``torch.load(weights_only=True, mmap=True)``.

    Raises:
        AdapterFileError: if it cannot be read, or is none of these.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}"))
        if len(found) != 1:
            raise AdapterFileError(f"{path} is a folder with {len(found)} files *{INDEX}: name the file of the base")
        path = found[0]
    with ExitStack() as stack:
        if path.name.endswith(INDEX):
            yield _sharded(path, stack)
        elif path.suffix == ".safetensors":
            yield _Safetensors(path, {path.name: stack.enter_context(opened(path))})
        elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            yield _Pickled(path, _unpickled(path))
        else:
            raise AdapterFileError(
                f"{path} is no base that can be read: .safetensors, {INDEX}, .pt, .pth, .bin or .ckpt"
            )


def _sharded(path: Path, stack: ExitStack) -> Checkpoint:
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_INDEX + 1)
        index = strict_json(text[:_MOST_INDEX].decode("utf-8")) if len(text) <= _MOST_INDEX else None
        places = index["weight_map"]  # type: ignore[index]
        names = sorted(set(places.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no index of shards: {type(error).__name__}: {brief(str(error))}") from error
    strange = [name for name in names if not isinstance(name, str) or os.path.basename(name) != name or not name]
    if strange:
        raise AdapterFileError(f"{path} names a shard {shown(strange[0])}: shards lie beside their index")
    files = {name: stack.enter_context(opened(path.with_name(name))) for name in names}
    wrong = [key for key, name in places.items() if key not in files[name].tensors]
    extra = [key for name, file in files.items() for key in file.tensors if places.get(key) != name]
    if wrong or extra:
        raise AdapterFileError(f"{path} and its shards do not agree on {shortened([*wrong, *extra], 4)}")
    return _Safetensors(path, files)


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what torch says is many lines long
        what = str(error).strip().splitlines() or [""]
        raise AdapterFileError(
            f"{path} cannot be read with torch.load(weights_only=True): {type(error).__name__}: {brief(what[0])} "
            "Load it where you trust it, and save its state_dict(), best as safetensors"
        ) from error
    for name in _HOLDERS:
        inner = held.get(name) if isinstance(held, Mapping) and not _is_tensors(held) else None
        if inner is not None and _is_tensors(inner):
            held = inner
            break
    if not _is_tensors(held):
        keys = f" with {shortened(list(map(str, held)), 6)}" if isinstance(held, Mapping) else ""
        raise AdapterFileError(
            f"{path} holds a {type(held).__name__}{keys}, and no tensors by name: save a state_dict()"
        )
    return dict(held)


def _is_tensors(held: Any) -> bool:
    if not isinstance(held, Mapping) or not held:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in held.items())
