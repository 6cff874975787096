"""Limits on processor time that neighbours on a busy machine don't break: what hangs does so each time it is tried."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], *, tries: int = 3) -> T:
    """Return what a call returns, of the first try that takes less than ``seconds`` of this process's processor time.

    Raises:
        AssertionError: if none of the tries does.
    """
    taken = []
    for _ in range(tries):
        started = time.process_time()
        result = call()
        taken.append(time.process_time() - started)
        if taken[-1] < seconds:
            return result
    raise AssertionError(f"took {', '.join(f'{each:.2f}' for each in taken)} s; the limit is {seconds} s")
