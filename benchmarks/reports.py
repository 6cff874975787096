"""What a script found: tables of results and of verdicts, the machine, as JSON and as Markdown."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .runner import Result

PACKAGES = ("torch", "ultralytics", "peft", "lycoris-lora")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Table:
    """Cases measured side by side, the first being the baseline.

    Attributes:
        title: what was measured, on what.
        results: of all cases.
        axis, x: what grows from table to table, and how large it is in this one; for plots.
        notes: sentences below the table.
    """

    title: str
    results: tuple[Result, ...]
    axis: str | None = None
    x: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grid:
    """Anything else that is a table: a title, a head and rows of text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """Return it as a Markdown table."""
        lines = [f"| {' | '.join(self.head)} |", f"| --- |{' ---: |' * (len(self.head) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note))])


@dataclass(frozen=True)
class Verdict:
    """A row of the acceptance table: what was asked for, and what was measured.

    Attributes:
        row: what is judged, all of it relative to what the row names.
        must, aim: upper bounds.
        value, low, high: the median, and the quartiles around it.
        detail: absolute figures.
    """

    row: str
    must: float
    aim: float
    value: float
    low: float
    high: float
    detail: str

    @property
    def passed(self) -> bool:
        """Whether the median is within the bound; no number never is."""
        return math.isfinite(self.value) and self.value <= self.must


@dataclass(frozen=True)
class Report:
    """All that a script found, and how to get it again.

    Attributes:
        script: the module's name.
        command: that was run.
        settings: all options.
        when: UTC.
        machine: what ran it.
        tables, verdicts, grids: the results.
    """

    script: str
    command: str
    settings: dict[str, Any]
    when: str
    machine: dict[str, Any]
    tables: tuple[Table, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    grids: tuple[Grid, ...] = ()


@dataclass
class Stopwatch:
    """Notes when a script began, and how busy the machine was."""

    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    load: float = field(default_factory=lambda: os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan)


def machine(load: float = math.nan) -> dict[str, Any]:
    """Return what runs the measurement: processor, cores, threads, versions, GPU, how busy it was."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": None if math.isnan(load) else round(load, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the revision that is measured, marked where files of the library differ from it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = ["git", "rev-parse", "--short=10", "HEAD"], ["git", "status", "--porcelain", "--", "convpeft"]
        found = [subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30) for c in revision]
        return found[0].stdout.strip() + (" and changes" if found[1].stdout.strip() else "")
    return None


def write(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Report:
    """Return the report that ``write`` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    tables = []
    for table in data.pop("tables"):
        results = [Result(**{**row, "quartiles": tuple(row["quartiles"])}) for row in table.pop("results")]
        tables.append(Table(**{**table, "results": tuple(results), "notes": tuple(table["notes"])}))
    verdicts = tuple(Verdict(**row) for row in data.pop("verdicts"))
    grids = [
        Grid(g["title"], tuple(g["head"]), tuple(map(tuple, g["rows"])), tuple(g["notes"])) for g in data.pop("grids")
    ]
    return Report(**data, tables=tuple(tables), verdicts=verdicts, grids=tuple(grids))


def shown(seconds: float) -> str:
    """Return a time with a unit that suits it, three digits.

    Example:
        >>> shown(0.01234), shown(2.5), shown(4.2e-05)
        ('12.3 ms', '2.50 s', '42.0 µs')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale or unit == "µs":
            number = seconds / scale
            digits = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2
            return f"{number:.{digits}f} {unit}"
    raise AssertionError("the last unit takes everything")


def ratio(value: float) -> str:
    """Return a ratio with two digits after the point, or two that count where it is smaller."""
    return f"{value:.2f}" if value >= 0.1 or value <= 0 else f"{value:.2g}"


def markdown(table: Table) -> str:
    """Return a table of results; columns that no row has a number for are left out."""
    base = table.results[0].name
    columns = [
        ("trainable", [None if r.trainable is None else f"{r.trainable:,}" for r in table.results]),
        (f"time ÷ {base} (quartiles)", [_spread(r) for r in table.results]),
        ("CPU time ÷", [ratio(r.cpu_ratio) if math.isfinite(r.cpu_ratio) else None for r in table.results]),
        ("time", [shown(r.seconds) for r in table.results]),
        ("kept for backward ÷", [_maybe(r.saved_ratio) for r in table.results]),
        ("kept, MB", [_megabytes(r.saved_bytes) for r in table.results]),
        ("peak ÷", [_maybe(r.peak_ratio) for r in table.results]),
        ("peak, MB", [_megabytes(r.peak_bytes) for r in table.results]),
    ]
    columns = [(title, cells) for title, cells in columns if any(cell is not None for cell in cells)]
    lines = [f"| case | {' | '.join(title for title, _ in columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for number, result in enumerate(table.results):
        lines.append(f"| {result.name} | {' | '.join(cells[number] or '–' for _, cells in columns)} |")
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines)


def _spread(result: Result) -> str:
    low, high = result.quartiles
    return f"{ratio(result.ratio)} ({ratio(low)}–{ratio(high)})"


def _maybe(value: float | None) -> str | None:
    return None if value is None else ratio(value)


def _megabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f}"


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Return the acceptance table."""
    lines = ["| row | must be | aim | measured (quartiles) | | figures |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for v in verdicts:
        spread = f"{ratio(v.value)} ({ratio(v.low)}–{ratio(v.high)})" if v.low != v.high else ratio(v.value)
        word = "**fail**" if not v.passed else "pass, aim reached" if v.value <= v.aim else "pass"
        lines.append(f"| {v.row} | ≤ {_bound(v.must)} | {_bound(v.aim)} | {spread} | {word} | {v.detail} |")
    return "\n".join(lines)


def _bound(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:g}"
