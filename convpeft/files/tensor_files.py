"""Safetensors files written tensor by tensor: space for the header is left first, and filled when all shapes are known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterFileError
from .reading import DTYPES, Entry
from .writing import replacing

_ROOM = 1000  # no side of a kernel that grows becomes as large


class TensorFile:
    """A safetensors file that is being written; see ``tensor_file``.

    Attributes:
        size: bytes of the tensors so far.
    """

    def __init__(self, file: BinaryIO, room: int, metadata: Mapping[str, str]) -> None:
        self._file, self._room, self._metadata = file, room, dict(metadata)
        self._header: dict[str, object] = {}
        self.size = 0
        file.write(b" " * (8 + room))

    def add(self, key: str, entry: Entry, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one tensor: shape and dtype, and its bytes."""
        begin = self.size
        for chunk in chunks:
            self._file.write(chunk)
            self.size += len(chunk)
        shape, dtype = entry
        self._header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, self.size]}

    def add_tensor(self, key: str, tensor: Tensor) -> None:
        """Write one tensor that is in memory."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        self.add(key, (tuple(tensor.shape), NAMES[tensor.dtype]), [content])

    def finish(self) -> None:
        """Write the header into the space that was left for it."""
        text = _text(self._header, self._metadata)
        if len(text) > self._room:
            raise AdapterFileError(f"its header of {len(text):,} bytes is larger than planned; nothing was written")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))


NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def tensor_file(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Iterator[TensorFile]:
    """Give a safetensors file to write tensors to inside the context; it takes its place at the end, whole.

    Args:
        path: of the file.
        entries: shape and dtype, by key, of every tensor that may be written. Sides may grow up to 999.
        metadata: texts by key.

    Raises:
        AdapterFileError: if it cannot be written.
    """
    most = 10 ** len(str(sum(size_of(entry) for entry in entries.values()) * _ROOM))
    widest = {
        key: {
            "dtype": dtype,
            "shape": [*shape[:2], *(max(side, _ROOM) for side in shape[2:])],
            "data_offsets": [most, most],
        }
        for key, (shape, dtype) in entries.items()
    }
    room = -(-len(_text(widest, metadata)) // 8) * 8
    with replacing(path) as file:
        writer = TensorFile(file, room, metadata)
        yield writer
        writer.finish()


def size_of(entry: Entry) -> int:
    """Return the bytes of a tensor."""
    shape, dtype = entry
    return math.prod(shape) * DTYPES[dtype].itemsize


def in_file_order(entries: Mapping[str, Entry]) -> Sequence[str]:
    """Return the keys in the order in which a file has its tensors: large dtypes first, so that each is aligned."""

    def place(key: str) -> tuple[int, str, str]:
        module, _, name = key.rpartition(".")
        return -DTYPES[entries[key][1]].itemsize, module, name

    return sorted(entries, key=place)


def _text(header: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    texts = {"__metadata__": dict(metadata)} if metadata else {}
    return json.dumps({**texts, **header}, separators=(",", ":")).encode()
