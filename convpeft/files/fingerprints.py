"""Digests of a base model, layer by layer: an adapter only means something on the base it was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..hosts.modules import unique_modules
from ..hosts.slots import BASE
from ..hosts.unfrozen import tensors_of

ALGORITHM = "blake2b-128"

_COUNTERS = ("num_batches_tracked",)  # how often a norm was updated changes no output

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


def _is_at_hand(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not hasattr(tensor, "full_tensor")
