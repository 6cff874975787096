"""Measure cases side by side: interleaved rounds, ratios within a round, medians with spread, JSON and a table.

Machines are shared and noisy, so a time alone says little. Every round runs each case once, in an order drawn anew,
and a case is judged by its time divided by the baseline's time of the same round.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: in the table.
        step: runs once what is timed.
        model: whose parameters do not count as kept for backward.
    """

    name: str
    step: Callable[[], None]
    model: nn.Module


@dataclass(frozen=True)
class Result:
    """What a case came to; ratios are to the first case.

    Attributes:
        seconds: median of a step.
        ratio: median over the rounds.
        quartiles: of the ratio, first and third.
        saved_bytes: kept by autograd for one backward pass, parameters not counted.
        saved_ratio: the same, relative to the first case.
        trainable: number of trainable parameters.
    """

    name: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]
    saved_bytes: int
    saved_ratio: float
    trainable: int


def side_by_side(cases: Sequence[Case], *, rounds: int = 7, warm_up: int = 2, seed: int = 0) -> list[Result]:
    """Return the results of all cases, the first being the baseline.

    Args:
        cases: at least one.
        rounds: timed runs of each case.
        warm_up: untimed runs of each case before them.
        seed: of the order within each round.
    """
    order = random.Random(seed)
    saved = [saved_bytes(case) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for number in tqdm(range(warm_up + rounds), desc="rounds"):
        positions = list(range(len(cases)))
        order.shuffle(positions)
        for position in positions:
            seconds = timed(cases[position].step)
            if number >= warm_up:
                times[position].append(seconds)
    results = []
    for case, own, kept in zip(cases, times, saved, strict=True):
        ratios = sorted(mine / base for mine, base in zip(own, times[0], strict=True))
        spread = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else [ratios[0]] * 3
        trainable = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
        middle, edges = statistics.median(ratios), (spread[0], spread[2])
        results.append(
            Result(case.name, statistics.median(own), middle, edges, kept, kept / max(1, saved[0]), trainable)
        )
    return results


def timed(step: Callable[[], None]) -> float:
    """Return the seconds one step takes, waiting for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def saved_bytes(case: Case) -> int:
    """Return how many bytes autograd keeps for the backward passes of one step; shared storages count once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in case.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        case.step()
    return sum(kept.values())


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    base = results[0].name
    lines = [
        f"| case | trainable | time ÷ {base} (quartiles) | seconds | kept for backward ÷ {base} | MB kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        low, high = r.quartiles
        lines.append(
            f"| {r.name} | {r.trainable:,} | {r.ratio:.2f} ({low:.2f}–{high:.2f}) | {r.seconds:.3f} "
            f"| {r.saved_ratio:.2f} | {r.saved_bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what ran the measurement: versions, processor, threads, GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def report(results: Sequence[Result], settings: dict[str, Any], path: Path | None) -> None:
    """Print machine, settings and table, and write all of it as JSON where a path is given."""
    print(f"{machine()}\n{settings}\n\n{table(results)}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "settings": settings, "results": [asdict(result) for result in results]}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
