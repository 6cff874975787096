"""The learning rate over a run: linear warm-up, then half a cosine down to a floor that it never leaves."""

from __future__ import annotations

import math

FLOOR = 0.05
WARM_UP = 0.1


def rate_factor(step: int, steps: int, *, warm_up: float = WARM_UP, floor: float = FLOOR) -> float:
    """Return what the base learning rate is multiplied by at a step, counted from 0.

    Linear from ``floor`` to 1 over the first ``warm_up`` share of the steps, then half a cosine from 1 down to
    ``floor``. It stays at ``floor`` past the end, so it is never below it, let alone negative.

    Example:
        >>> [round(rate_factor(step, 100), 2) for step in (0, 10, 55, 100, 1000)]
        [0.05, 1.0, 0.53, 0.05, 0.05]
    """
    if step >= steps:
        return floor
    rising = max(round(warm_up * steps), 1)
    if step < rising:
        return floor + (1 - floor) * max(step, 0) / rising
    done = (step - rising) / (steps - rising)
    return max(floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)), floor)
