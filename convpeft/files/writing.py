"""Write bytes in one step: beside the final place, flushed, and moved there; a crash leaves the old file."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import AdapterFileError
from .reading import kind_of_file

_SHORT = 60  # bytes: a name of up to as many fits every file system
_OLD = 3600  # seconds: a file that nobody has written to for so long is being written no more
_PART = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part$")
_PART_BEFORE = re.compile(r"\.[a-z0-9_]{8}\.part$")  # of earlier versions
_NOT_OFFERED = {
    getattr(errno, name) for name in ("EPERM", "EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP") if hasattr(errno, name)
}  # what file systems say that have no modes, or cannot flush one file


def write(path: Path, content: bytes) -> None:
    """Write bytes to a file in one step. A file that is replaced keeps its mode and owner; a link stays, and its target is replaced.

    Raises:
        AdapterFileError: if it cannot be written, or is a folder, a pipe or a device.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to inside the context, which takes its place at the end; after an error the old one stays.

    Raises:
        AdapterFileError: if it cannot be written, or is a folder, a pipe or a device.
    """
    temporary: Path | None = None
    writing = False
    try:
        target = Path(os.path.realpath(path))
        before = _replaced(target)
        mode = None if before is None else stat.S_IMODE(before.st_mode) & 0o777
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        temporary = target.with_name(_name_of_part(target.name))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            writing = True
            yield file
            writing = False
            file.flush()
            with _if_offered():
                os.fsync(file.fileno())
            made = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if before is not None and hasattr(os, "chown") and os.geteuid() == 0:
            with contextlib.suppress(OSError):
                os.chown(temporary, before.st_uid, before.st_gid)
        with _if_offered():
            os.chmod(temporary, made if mode is None else mode)
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        if writing and not isinstance(error, OSError):  # of the one who writes
            raise
        raise AdapterFileError(f"{path} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _replaced(target: Path) -> os.stat_result | None:
    """Return what is known of the file that is to be replaced, or None if there is none.

    Raises:
        OSError: if it is no plain file.
    """
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        raise OSError("its links go in a circle")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"it is {kind_of_file(found.st_mode)}")
    return found


@contextlib.contextmanager
def _if_offered() -> Iterator[None]:
    """Let a step be left out on file systems that do not offer it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


def _name_of_part(name: str) -> str:
    """Return a name for the file beside ``name``: who writes it can be read from it, and it is no longer than it may be."""
    end = f".{_machine()}-{os.getpid()}-{os.urandom(4).hex()}.part"
    return f".{_stem(name, len(end))}{end}"


def _stem(name: str, taken: int) -> str:
    """Return as much of a name as fits beside ``taken`` bytes and a dot, where the name itself fits."""
    whole = os.fsencode(name)
    most = max(len(whole), _SHORT) - taken - 1
    return name if len(whole) <= most else whole[: max(most, 1)].decode("utf-8", "ignore")


def _machine() -> str:
    """Return what tells the processes of this machine and container from all others that see the same folder."""
    known = [platform.node()]
    for tell in (lambda: os.readlink("/proc/self/ns/pid"), lambda: Path("/proc/sys/kernel/random/boot_id").read_text()):
        with contextlib.suppress(OSError):
            known.append(tell())
    return f"{zlib.crc32('|'.join(known).encode()):08x}"


def _clear(target: Path) -> None:
    """Delete what processes that were killed have left beside a file; nothing that is still being written."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(target.parent):
            if entry.name.startswith(".") and entry.name.endswith(".part") and _is_left(entry, target.name):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_left(entry: os.DirEntry[str], name: str) -> bool:
    """Return whether a file was to become ``name`` once, and its writer is gone."""
    found = _PART.search(entry.name) or _PART_BEFORE.search(entry.name)
    if found is None or not entry.is_file(follow_symlinks=False):
        return False
    stem = entry.name[1 : found.start()]
    if stem not in (name, _stem(name, len(entry.name) - found.start())):
        return False
    if found.re is _PART and found[1] == _machine() and os.name == "posix":
        return not _runs(int(found[2]))
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
