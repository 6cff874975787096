"""Measure cases side by side: interleaved rounds, ratios within a round, medians with quartiles.

Machines are shared and noisy, so a time alone says little. Every round runs each case once, in an order drawn anew,
and a case is judged by its time divided by the baseline's time of the same round. Beside the wall clock the process's
own CPU time is taken: what other processes do lengthens the first far more than the second.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .memory import peak_bytes, saved_bytes


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: in the table.
        step: runs once what is timed; gets what ``prepare`` returned, if that is not None.
        modules: whose parameters do not count as kept for backward, and whose trainable parameters are counted.
        prepare: runs before each step, untimed.
        repeat: steps in one timed sample, for what is too short to time alone.
        trains: whether a step has a backward pass, so that its memory is worth counting.
    """

    name: str
    step: Callable[..., Any]
    modules: tuple[nn.Module, ...] = ()
    prepare: Callable[[], Any] = nothing
    repeat: int = 1
    trains: bool = False


@dataclass(frozen=True)
class Result:
    """What a case came to; ratios are to the baseline, the first case. None stands for what was not measured.

    Attributes:
        seconds, cpu_seconds: medians of a step: wall clock, and CPU time of the process.
        ratio, quartiles: of the wall clock, over the rounds: median, and first and third quartile.
        cpu_ratio: of the CPU time, median over the rounds.
        saved_bytes: the most that autograd held for backward at one time, parameters not counted.
        peak_bytes: the most that the allocator held at one time, beyond what it held before the step.
        trainable: number of trainable parameters.
    """

    name: str
    seconds: float
    cpu_seconds: float
    ratio: float
    quartiles: tuple[float, float]
    cpu_ratio: float
    saved_bytes: int | None = None
    saved_ratio: float | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    trainable: int | None = None


@dataclass
class _Samples:
    """The times of one case, a number for each round, and its memory."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    saved: int | None = None
    peak: int | None = None


def side_by_side(cases: Sequence[Case], *, rounds: int = 7, warm_up: int = 2, seed: int = 0) -> list[Result]:
    """Return the results of all cases, the first being the baseline.

    Args:
        cases: at least one.
        rounds: timed samples of each case.
        warm_up: untimed ones before them.
        seed: of the order within each round.
    """
    order = random.Random(seed)
    samples = [_Samples() for _ in cases]
    for number in tqdm(range(warm_up + rounds), desc="rounds", disable=None):
        positions = list(range(len(cases)))
        order.shuffle(positions)
        for position in positions:
            wall, cpu = timed(cases[position])
            if number >= warm_up:
                samples[position].wall.append(wall)
                samples[position].cpu.append(cpu)
    for case, own in zip(cases, samples, strict=True):
        if case.trains:  # after the rounds, so that whatever is made once is there
            own.saved, own.peak = saved_bytes(case.step, case.modules), peak_bytes(case.step)
    return [_result(case, own, samples[0]) for case, own in zip(cases, samples, strict=True)]


def timed(case: Case) -> tuple[float, float]:
    """Return the seconds of one step, wall clock and CPU, waiting for the GPU if there is one."""
    prepared = case.prepare()
    arguments = () if prepared is None else (prepared,)
    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # another case's garbage is not this one's time
    try:
        _wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(case.repeat):
            case.step(*arguments)
        _wait()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    finally:
        if collects:
            gc.enable()
    return wall / case.repeat, cpu / case.repeat


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _result(case: Case, own: _Samples, base: _Samples) -> Result:
    ratios = [mine / other for mine, other in zip(own.wall, base.wall, strict=True)]
    cpu_ratios = [mine / max(other, 1e-9) for mine, other in zip(own.cpu, base.cpu, strict=True)]
    parameters = {id(p): p for module in case.modules for p in module.parameters() if p.requires_grad}
    return Result(
        name=case.name,
        seconds=statistics.median(own.wall),
        cpu_seconds=statistics.median(own.cpu),
        ratio=statistics.median(ratios),
        quartiles=quartiles(ratios),
        cpu_ratio=statistics.median(cpu_ratios),
        saved_bytes=own.saved,
        saved_ratio=_over(own.saved, base.saved),
        peak_bytes=own.peak,
        peak_ratio=_over(own.peak, base.peak),
        trainable=sum(p.numel() for p in parameters.values()) if case.modules else None,
    )


def _over(own: int | None, base: int | None) -> float | None:
    return None if own is None or base is None else own / max(1, base)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of one value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
