"""Digests of a base model, layer by layer: an adapter only means something on the base it was trained on."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..hosts.modules import is_batchnorm_like, unique_modules
from ..hosts.slots import BASE
from ..hosts.unfrozen import tensors_of

ALGORITHM = "blake2b-128"

COUNTERS = ("num_batches_tracked",)  # how often a norm was updated changes no output

_CASTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what a base may have been cast to as a whole

_THREADS = min(8, os.cpu_count() or 1)
_SMALL = 2**14  # bytes of a module: hashing as much takes no longer than finding out whether it changed
_COLUMNS = 64  # words of a block that one sum is of


class _Known(NamedTuple):
    """The digest of a module's tensors, and what tells whether they are still the same."""

    names: tuple[str, ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    sums: tuple[int, ...]
    digest: str


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on the CPU and contiguous; where FSDP2 shards it, all processes have to ask together."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().contiguous()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest of named tensors: names, dtypes, shapes and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        whole = plain(tensor)
        state.update(f"{name}|{whole.dtype}|{tuple(whole.shape)}|".encode())
        state.update(whole.reshape(-1).view(torch.uint8).numpy().data if whole.numel() else b"")
    return state.hexdigest()


def fingerprint(root: nn.Module) -> dict[str, str]:
    """Return a digest for each module of the base that has tensors of its own, by module name.

    The base's own values count, also where an adapter shows its own at the moment; counters of norm updates do not.
    """
    with hashing(root) as found:
        return found()


@contextmanager
def hashing(root: nn.Module) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash a base in other threads while the context's block runs, and give a function that waits for its ``fingerprint``."""
    counted: dict[str, tuple[nn.Module, list[tuple[str, Tensor]]]] = {}
    for name, module in unique_modules(root):
        own = [(key, tensor) for key, tensor in tensors_of(module, BASE).items() if key not in COUNTERS]
        if own:
            counted[name] = module, own
    if not all(_is_at_hand(tensor) for _, own in counted.values() for _, tensor in own):
        whole = {name: digest(own) for name, (_, own) in counted.items()}  # one after the other: gathered or fetched
        yield lambda: whole
        return
    pool = ThreadPoolExecutor(_THREADS)  # hashing lets go of Python's lock
    try:
        large = {name: pool.submit(_remembered, entry) for name, entry in counted.items() if _size(entry[1]) > _SMALL}
        yield lambda: {
            name: large[name].result() if name in large else digest(own) for name, (_, own) in counted.items()
        }
    finally:
        pool.shutdown(cancel_futures=True)


def _size(own: Sequence[tuple[str, Tensor]]) -> int:
    return sum(tensor.nbytes for _, tensor in own)


def _remembered(entry: tuple[nn.Module, list[tuple[str, Tensor]]]) -> str:
    """Return the digest of a module's tensors on the CPU; not hashed again while nothing has written to them.

    A tensor's version tells of writes that go through torch, and sums of its content of others (``tensor.data``, NumPy):
    reading it once is several times faster than hashing.
    """
    module, own = entry
    tensors = [tensor for _, tensor in own]
    if any(tensor.is_inference() for tensor in tensors):
        return digest(own)
    names = tuple(name for name, _ in own)
    versions = tuple(tensor._version for tensor in tensors)
    known = _KNOWN.get(module)
    if known is not None and (known.names, known.versions) == (names, versions):
        are_same = all(ref() is each for ref, each in zip(known.tensors, tensors, strict=True))
        if are_same and known.sums == tuple(map(_content_sum, tensors)):
            return known.digest
    made = digest(own)
    sums = tuple(map(_content_sum, tensors))
    if versions == tuple(tensor._version for tensor in tensors):
        _KNOWN[module] = _Known(names, tuple(map(weakref.ref, tensors)), versions, sums, made)
    return made


@torch.no_grad()
def _content_sum(tensor: Tensor) -> int:
    """Return a number that a change of a tensor's bytes changes, unless it keeps the sum of each block of 512 bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    count = flat.numel() // (8 * _COLUMNS)
    whole = count * 8 * _COLUMNS
    rows = flat[:whole].view(torch.int64).view(count, _COLUMNS)
    rest = rows.sum(1).numpy().tobytes(), flat[whole:].numpy().tobytes()
    return hash((tensor.dtype, tuple(tensor.shape), *rest))


def parts(root: nn.Module) -> dict[str, dict[str, str]]:
    """Return, for each module of the base with buffers, a digest of its parameters (``""``) and one of each buffer.

    Norms are left out: all of a norm is the base's. Other modules may make buffers at the first pass (anchors, grids), so
    that one base has them and the same base in another process has not.
    """
    found: dict[str, dict[str, str]] = {}
    for name, module in unique_modules(root):
        if module._buffers and not is_batchnorm_like(module):
            each = _parts(tensors_of(module, BASE))
            if len(each) > 1:
                found[name] = each
    return found


def _parts(tensors: dict[str, Tensor]) -> dict[str, str]:
    own = [(key, tensor) for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]
    buffers = {key: tensor for key, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)}
    return {"": digest(own) if own else "", **{key: digest([(key, tensor)]) for key, tensor in buffers.items()}}


def differing(
    root: nn.Module, here: dict[str, str], layers: dict[str, str], parts_there: dict[str, dict[str, str]]
) -> tuple[list[str], int, torch.dtype | None]:
    """Return the base's layers that are not those a file was made on, how many layers there are here, and the file's dtype.

    A buffer that only one of the two has is no difference: the module made it when it ran. Nor is a dtype, if the values
    here, in the dtype of the file's base, are the file's: then that dtype is returned, and None otherwise. The other way
    round nothing can be said: half precision does not tell which float32 base it came from.

    Args:
        root: of the model here.
        here: its ``fingerprint``.
        layers, parts_there: digests in the file.
    """
    modules = dict(unique_modules(root))
    suspects = [key for key in {**layers, **here} if layers.get(key) != here.get(key)]
    found, cast = [], None
    for key in suspects:
        module = modules.get(key)
        if module is None:
            found.append(key)
            continue
        there = layers.get(key, ""), parts_there.get(key)
        tried = (None, *([cast] if cast is not None else _CASTS))
        fits = [dtype for dtype in tried if _is_alike(module, *there, dtype)]
        if not fits:
            found.append(key)
        elif fits[0] is not None:
            cast = fits[0]
    return found, len(here), cast


def _in(dtype: torch.dtype | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a cast of the whole model would have them."""
    if dtype is None:
        return tensors
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    return {
        key: nn.Parameter(new, False) if isinstance(tensors[key], nn.Parameter) else new for key, new in cast.items()
    }


def _is_alike(module: nn.Module, layer: str, there: dict[str, str] | None, dtype: torch.dtype | None) -> bool:
    """Return whether a layer, in a dtype, is the one of a file up to buffers that only one of the two has."""
    own = _in(dtype, tensors_of(module, BASE))
    counted = [(key, tensor) for key, tensor in own.items() if key not in COUNTERS]
    if dtype is not None and counted and digest(counted) == layer:
        return True
    if is_batchnorm_like(module):
        return False
    ours = _parts(own)
    if there is None:  # it had no buffers, or the file is older than these digests
        shown = _in(
            dtype, {key: each for key, each in {**module._parameters, **module._buffers}.items() if each is not None}
        )
        hidden = module._non_persistent_buffers_set
        now = [(key, each) for key, each in shown.items() if key not in hidden]
        return layer in (ours[""], digest(now) if now else "")
    return all(ours[key] == there[key] for key in ours.keys() & there.keys())


def _is_at_hand(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not hasattr(tensor, "full_tensor")
