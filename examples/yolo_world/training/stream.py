"""The order of the images and their augmentation as a function of seed and position, so that a run can begin anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.images import Batch, Collate


def seed_of(*parts: int | str) -> int:
    """Return a seed that depends on all parts and on nothing else, the same on every machine.

    Example:
        >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
        (True, False)
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=4)
def order_of(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of ``count`` images in an epoch.

    Example:
        >>> sorted(order_of(4, 0, 7))
        [0, 1, 2, 3]
    """
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


class Stream(Dataset[dict[str, Tensor]]):
    """A data set without an end: epoch after epoch, each in its own order; the item at a position is always the same.

    Args:
        data: items by index; what it draws from torch's global random numbers is seeded by seed, epoch and index.
        seed: of order and augmentation.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def place(self, position: int) -> tuple[int, int]:
        """Return the epoch and the index in the data set of a position."""
        epoch, offset = divmod(position, len(self.data))
        return epoch, order_of(len(self.data), self.seed, epoch)[offset]

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        epoch, index = self.place(position)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("item", self.seed, epoch, index))
            return self.data[index]


class Positions(Sampler[list[int]]):
    """One process's batches of stream positions: the global batch number ``b`` is cut evenly between the processes.

    So the images of a global batch are the same for any number of processes with the same global batch size.

    Args:
        first, last: numbers of the first batch and of the one after the last.
        batch_size: images per process and batch.
        rank, processes: this process, and how many there are.
    """

    def __init__(self, first: int, last: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.first, self.last, self.batch_size, self.rank, self.processes = first, last, batch_size, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.first, self.last):
            start = (number * self.processes + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return max(self.last - self.first, 0)


def batches(data: Any, texts: Tensor, seed: int, positions: Positions, *, workers: int = 0) -> Iterator[Batch]:
    """Yield one process's batches, as ultralytics' losses want them.

    Args:
        data: items by index, ``{img, cls, bboxes}``.
        texts: features of the classes, ``(1, number of classes, 512)``.
        seed: of order and augmentation.
        positions: which batches.
        workers: processes that load ahead; they change nothing in the batches.
    """
    loader: DataLoader[Any] = DataLoader(
        Stream(data, seed), batch_sampler=positions, collate_fn=Collate(texts), num_workers=workers,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    yield from loader
