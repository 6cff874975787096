"""Results as Markdown tables, as JSON, and, for the demo, as an honest summary in words."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..training.scores import Scores


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        method: ``base``, ``adapter`` or ``full fine-tuning``.
        trained_on: category, None for the base.
        scores: scores by the category they were taken on.
        trainable: number of trained parameters.
        share: the same as a part of the base's parameters.
        seconds_per_step: mean time of an optimizer step, data loading included.
        file_bytes: size of the file that holds what was trained.
    """

    method: str
    trained_on: str | None
    scores: dict[str, Scores]
    trainable: int
    share: float
    seconds_per_step: float | None
    file_bytes: int

    @property
    def title(self) -> str:
        """Return the method and what it was trained on."""
        return self.method if self.trained_on is None else f"{self.method}: {self.trained_on}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in (
        "convpeft",
        "torch",
        "ultralytics",
        "accelerate",
        "torchmetrics",
        "pycocotools",
        "numpy",
        "opencv-python",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def typed_command() -> str:
    """Return the command that runs now as it can be typed again, without what launched it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else sys.argv[:1]
    return shlex.join(["python", *name, *sys.argv[1:]])


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, ["---"] * len(titles), *rows))


def readable_size(size: int) -> str:
    """Return bytes as kB or MB.

    Example:
        >>> readable_size(652_000), readable_size(14_300_000)
        ('652 kB', '14.3 MB')
    """
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def markdown_table(rows: Sequence[Row], categories: Sequence[str]) -> str:
    """Return the rows as a Markdown table: mAP50 / mAP50-95 on each category, then what it costs."""
    titles = ["model", *(f"{name}: mAP50 / mAP50-95" for name in categories), "trainable", "share", "s/step", "file"]
    cells = []
    for row in rows:
        scores = [f"{row.scores[name].map50:.3f} / {row.scores[name].map50_95:.3f}" for name in categories]
        seconds = "–" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}"
        cost = [f"{row.trainable:,}", f"{100 * row.share:.2f} %", seconds, readable_size(row.file_bytes)]
        cells.append([row.title, *scores, *cost])
    return table(titles, cells)


def find_row(rows: Sequence[Row], method: str, trained_on: str | None) -> Row:
    """Return the row of a method and category."""
    return next(row for row in rows if row.method == method and row.trained_on == trained_on)


def summarise(rows: Sequence[Row], categories: Sequence[str], *, quick: bool) -> list[str]:
    """Return sentences that compare each adapter with the base and with full fine-tuning, whoever is better."""
    lines = ["This was --quick: every step ran, but the numbers mean nothing."] if quick else []
    for name in categories:
        base, adapter, full = (
            find_row(rows, *key) for key in (("base", None), ("adapter", name), ("full fine-tuning", name))
        )
        gain = adapter.scores[name].map50 - base.scores[name].map50
        verdicts = []
        for title, key in (("mAP50", "map50"), ("mAP50-95", "map50_95")):
            ahead = getattr(full.scores[name], key) - getattr(adapter.scores[name], key)
            if ahead > 0.01:
                verdicts.append(f"full fine-tuning is better by {ahead:.3f} {title}")
            elif ahead < -0.01:
                verdicts.append(f"the adapter is better than full fine-tuning by {-ahead:.3f} {title}")
            else:
                verdicts.append(f"both are level in {title} (difference {abs(ahead):.3f})")
        lines.append(
            f"{name}: the adapter is {gain:+.3f} mAP50 from the base with {100 * adapter.share:.2f} % of its parameters trained; "
            + "; ".join(verdicts) + f". It trains {adapter.trainable:,} parameters instead of {full.trainable:,}, takes "
            f"{relative_time(adapter, full)} per step, and its file is {readable_size(adapter.file_bytes)} instead of "
            f"{readable_size(full.file_bytes)}."
        )  # fmt: skip
        other = next(category for category in categories if category != name)
        lines.append(
            f"{name}'s adapter on {other}: {adapter.scores[other].map50:.3f} mAP50 (base {base.scores[other].map50:.3f}); "
            "an adapter serves its own category, which is why they are swapped."
        )
    return lines


def relative_time(adapter: Row, full: Row) -> str:
    """Return the adapter's time for a step compared with full fine-tuning's."""
    if not adapter.seconds_per_step or not full.seconds_per_step:
        return "no measured time"
    return f"{100 * adapter.seconds_per_step / full.seconds_per_step:.0f} % of the time"


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: dataclasses as dictionaries, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write the results, indented, to a file."""
    path.write_text(json.dumps(plain(results), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
