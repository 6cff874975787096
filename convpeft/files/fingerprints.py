"""Digests of a base model, layer by layer: an adapter only means something on the base it was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..hosts.modules import is_batchnorm_like, unique_modules
from ..hosts.slots import BASE
from ..hosts.unfrozen import tensors_of

ALGORITHM = "blake2b-128"

_COUNTERS = ("num_batches_tracked",)  # how often a norm was updated changes no output

_CASTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what a base may have been cast to as a whole

_THREADS = min(8, os.cpu_count() or 1)


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
    counted: dict[str, list[tuple[str, Tensor]]] = {}
    for name, module in unique_modules(root):
        own = [(key, tensor) for key, tensor in tensors_of(module, BASE).items() if key not in _COUNTERS]
        if own:
            counted[name] = own
    if not all(_is_at_hand(tensor) for own in counted.values() for _, tensor in own):
        return {name: digest(own) for name, own in counted.items()}  # one after the other: they are gathered or fetched
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing lets go of Python's lock
        return dict(zip(counted, pool.map(digest, counted.values()), strict=True))


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
    root: nn.Module, layers: dict[str, str], parts_there: dict[str, dict[str, str]]
) -> tuple[list[str], int, torch.dtype | None]:
    """Return the base's layers that are not those a file was made on, how many layers there are here, and the file's dtype.

    A buffer that only one of the two has is no difference: the module made it when it ran. Nor is a dtype, if the values
    here, in the dtype of the file's base, are the file's: then that dtype is returned, and None otherwise. The other way
    round nothing can be said: half precision does not tell which float32 base it came from.

    Args:
        root: of the model here.
        layers, parts_there: digests in the file.
    """
    here, modules = fingerprint(root), dict(unique_modules(root))
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
    counted = [(key, tensor) for key, tensor in own.items() if key not in _COUNTERS]
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
