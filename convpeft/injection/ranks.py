"""Ranks for many layers at once: one more rank goes where it keeps most of the change for its parameters."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What the ranks of one layer keep and cost.

    Attributes:
        energies: what the first rank keeps of the layer's change, the second, and so on.
        unit: parameters of each.
        shift: what a bias keeps; it comes with the first rank.
        bias: its parameters, 0 for a layer whose bias is unchanged.
        whole: parameters of the layer itself: its own tensors keep everything.
    """

    energies: Sequence[float]
    unit: int
    shift: float
    bias: int
    whole: int

    @property
    def total(self) -> float:
        """All of the change."""
        return sum(self.energies) + self.shift


@dataclass(frozen=True)
class Choice:
    """What one layer gets: a rank (0: nothing), or its own tensors whole."""

    rank: int = 0
    whole: bool = False


def allocate(layers: Mapping[str, Costs], budget: float = math.inf, energy: float = 1.0) -> dict[str, Choice]:
    """Return what each layer gets, greedily: always the rank that keeps most for each of its parameters.

    Within a layer ranks come in order, so the largest singular values are kept first. A layer whose ranks would cost as
    much as its own tensors gets these.

    Args:
        layers: costs by name.
        budget: parameters to spend.
        energy: share of the whole change, squared and summed, after which no more is taken.

    Example:
        >>> two = {"a": Costs([9.0, 1.0], 10, 0, 0, 100), "b": Costs([4.0, 4.0], 10, 0, 0, 100)}
        >>> {name: choice.rank for name, choice in allocate(two, budget=30).items()}
        {'a': 1, 'b': 2}
    """
    chosen = dict.fromkeys(layers, Choice())
    spent = dict.fromkeys(layers, 0)
    total = sum(costs.total for costs in layers.values())
    kept = 0.0
    queue: list[tuple[float, int, float, bool, int, str]] = []
    for order, (name, costs) in enumerate(layers.items()):
        heapq.heappush(queue, (*_next(costs, 0, 0), order, name))
    while queue and (kept < energy * total or energy >= 1):
        _, price, gain, whole, _, name = heapq.heappop(queue)
        if price > budget or gain <= 0:
            continue
        rank = chosen[name].rank + 1
        chosen[name] = Choice(0, True) if whole else Choice(rank)
        budget, kept, spent[name] = budget - price, kept + gain, spent[name] + price
        costs = layers[name]
        if not whole and rank < len(costs.energies):
            heapq.heappush(queue, (*_next(costs, rank, spent[name]), rank, name))
    return chosen


def _next(costs: Costs, rank: int, spent: int) -> tuple[float, int, float, bool]:
    """Return how the next step of a layer sorts, what it costs and keeps, and whether it is the layer's own tensors."""
    first = rank == 0
    price = costs.unit + (costs.bias if first else 0)
    gain = costs.energies[rank] + (costs.shift if first else 0)
    whole = spent + price >= costs.whole
    if whole:
        price = costs.whole - spent
        gain = sum(costs.energies[rank:]) + (costs.shift if first else 0)
    return -gain / price, price, gain, whole
