"""One open adapter file: its header, bounded and checked before anything is made of it, and its tensors.

A file is opened once. A writer puts a new file in its place in one step, so whoever has it open sees one of them whole.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterFileError, brief, shown
from ..planning.parsing import strict_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Entry = tuple[tuple[int, ...], str]  # shape and dtype of a tensor

_MOST_HEADER = 8 * 2**20  # bytes; a real one has some hundred kilobytes
_MOST_MEMORY = 48 * 2**20  # that reading it may take, by the estimate below
_COSTS = {b"{": 240, b"[": 90, b",": 100}  # bytes of memory for each in the text, at most
_LARGEST = 2**62  # of a number in it


class OpenFile:
    """An adapter file that is open for reading.

    Attributes:
        path: of the file, for errors.
        metadata: texts by key.
        tensors: shape and dtype by key, sorted.
    """

    CHUNK = 8 * 2**20  # bytes that are read at a time

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MOST_HEADER, size - 8):
            raise AdapterFileError(
                f"{path} is truncated or no safetensors file ({size:,} bytes, header said to be {length:,})"
            )
        header = _header(path, file.read(length))
        texts = header.pop("__metadata__", {})
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise self.damaged("its metadata is no mapping of texts")
        self.metadata: dict[str, str] = texts
        self._start = 8 + length
        self._places = {key: self._place(key, header[key]) for key in sorted(header)}
        self._check_places(size - self._start)
        self.tensors: dict[str, Entry] = {key: entry for key, (entry, _, _) in self._places.items()}

    def damaged(self, why: str) -> AdapterFileError:
        """Return the error that says so."""
        return AdapterFileError(f"{self.path} is damaged or no safetensors file: {why}")

    def _place(self, key: str, said: Any) -> tuple[Entry, int, int]:
        """Return what the header says of a tensor: shape and dtype, and where it begins and ends."""
        if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
            raise self.damaged(f"it does not say what {brief(key)} is")
        dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        if not isinstance(dtype, str) or not lists or not all(_is_size(number) for number in [*shape, *offsets]):
            raise self.damaged(f"{brief(key)} is {shown(said)}")
        begin, end = offsets
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise self.damaged(f"{brief(key)} of shape {shown(shape)} and dtype {dtype} has {end - begin:,} bytes")
        return (tuple(shape), dtype), begin, end

    def _check_places(self, size: int) -> None:
        """Raise an AdapterFileError unless the tensors follow one another and fill the file."""
        reached = 0
        for begin, end in sorted((begin, end) for _, begin, end in self._places.values()):
            if begin != reached or end < begin:
                raise self.damaged("its tensors overlap, or leave a gap")
            reached = end
        if reached != size:
            raise self.damaged(f"its tensors have {reached:,} bytes, and {size:,} are there")

    def read(self) -> dict[str, Tensor]:
        """Return all tensors, each with memory of its own.

        Raises:
            AdapterFileError: if one is not there any more, or of a dtype that has no name here.
        """
        return {key: self.tensor(key) for key in self.tensors}

    def tensor(self, key: str) -> Tensor:
        """Return one tensor; see ``read``."""
        (shape, dtype), begin, end = self._places[key]
        if dtype not in DTYPES:
            raise self.damaged(f"{brief(key)} has dtype {shown(dtype)}")
        content = torch.empty(end - begin, dtype=torch.uint8)
        self._file.seek(self._start + begin)
        if end > begin and self._file.readinto(content.numpy().data) != end - begin:  # type: ignore[attr-defined]
            raise self._changed()
        return content.view(DTYPES[dtype]).reshape(shape)

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor, at most ``CHUNK`` at a time."""
        _, begin, end = self._places[key]
        for start in range(begin, end, self.CHUNK):
            self._file.seek(self._start + start)
            content = self._file.read(min(self.CHUNK, end - start))
            if len(content) != min(self.CHUNK, end - start):
                raise self._changed()
            yield content

    def _changed(self) -> AdapterFileError:
        return self.damaged("it was changed while it was read")


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """Open a file inside the context; a folder, a pipe or a device is refused, and not waited for.

    Raises:
        AdapterFileError: if it cannot be read, or its header is not sound.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise AdapterFileError(f"{path} cannot be read: it is {kind_of_file(mode)}")
    with os.fdopen(handle, "rb") as file:
        try:
            yield OpenFile(path, file)
        except OSError as error:
            raise AdapterFileError(f"{path} cannot be read: {error}") from error


def kind_of_file(mode: int) -> str:
    """Return what is no plain file, in words."""
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device, no file")


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST


def _header(path: Path, content: bytes) -> dict[str, Any]:
    """Return the safetensors header as plain data, if reading it takes a bounded time and memory."""
    letters = 6 if content.isascii() else 24  # bytes for each, with the copies that are made of them
    memory = letters * len(content) + sum(cost * content.count(mark) for mark, cost in _COSTS.items())
    if memory > _MOST_MEMORY:
        raise AdapterFileError(f"{path} is no safetensors file: its header holds more than that of an adapter can")
    try:
        header = strict_json(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{path} is damaged or no safetensors file: its header is not JSON ({brief(str(error))})"
        ) from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    return header


def shapes_by_layer(tensors: Mapping[str, Entry], prefix: str) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the tensors of each module, from keys ``<prefix>:<module>:<tensor>``."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for key, (shape, _) in tensors.items():
        part, _, rest = key.partition(":")
        if part == prefix:
            found.setdefault(rest.rpartition(":")[0], []).append(shape)
    return found
