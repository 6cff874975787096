"""Draw results: bars for cases side by side, lines for what grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .reports import Table
from .runner import Result

OURS, THEIRS, BASE = "#1b6ca8", "#c8803c", "#777777"
MARKS = "osD^vP*"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "convpeft", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update(
        {"axes.spines.right": False, "svg.fonttype": "none", "figure.constrained_layout.use": True}
    )
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)
    return path


def colour(name: str) -> str:
    """Return the colour of a case: convpeft's, the peers', or the baselines'."""
    return OURS if name.startswith("convpeft") else THEIRS if name.startswith(("peft", "LyCORIS")) else BASE


def bars(table: Table, path: Path) -> Path:
    """Draw the times of a table relative to its baseline, and what is kept for backward where that was counted."""
    results = table.results[::-1]
    pyplot = _pyplot()
    counted = any(result.saved_ratio is not None for result in results)
    figure, axes = pyplot.subplots(1, 1 + counted, sharey=True, squeeze=False, figsize=(9, 0.7 + 0.24 * len(results)))
    _time_bars(axes[0][0], results, table.results[0].name)
    if counted:
        axes[0][1].barh(_names(results), [r.saved_ratio or 0 for r in results], color=[colour(r.name) for r in results])
        axes[0][1].axvline(1, color="black", linewidth=0.6)
        axes[0][1].set_xlabel(f"kept for backward ÷ {table.results[0].name}")
    figure.suptitle(table.title, fontsize=10)
    return _save(figure, path)


def _names(results: Sequence[Result]) -> list[str]:
    return [result.name for result in results]


def _time_bars(axis: Any, results: Sequence[Result], base: str) -> None:
    spread = [
        [max(0.0, r.ratio - r.quartiles[0]) for r in results],
        [max(0.0, r.quartiles[1] - r.ratio) for r in results],
    ]
    axis.barh(_names(results), [r.ratio for r in results], xerr=spread, color=[colour(r.name) for r in results])
    axis.axvline(1, color="black", linewidth=0.6)
    axis.set_xlabel(f"time ÷ {base}")


def lines(tables: Sequence[Table], path: Path) -> Path:
    """Draw how cases grow along the axis that the tables share: their time, and what is kept for backward."""
    pyplot = _pyplot()
    names = list(dict.fromkeys(result.name for table in tables for result in table.results))
    counted = any(result.saved_bytes is not None for table in tables for result in table.results)
    figure, axes = pyplot.subplots(1, 1 + counted, squeeze=False, figsize=(9 if counted else 6, 3.4))
    for number, name in enumerate(names):
        found = [(table.x, result) for table in tables for result in table.results if result.name == name]
        style = {"label": name, "marker": MARKS[number % len(MARKS)], "markersize": 4, "color": colour(name)}
        style["linestyle"] = "-" if number % 2 == 0 else "--"
        axes[0][0].plot([x for x, _ in found], [r.seconds for _, r in found], **style)
        if counted:
            axes[0][1].plot([x for x, _ in found], [(r.saved_bytes or 0) / 1e6 for _, r in found], **style)
    for axis, label in zip(axes[0], ("seconds", "kept for backward, MB"), strict=False):
        axis.set(xlabel=tables[0].axis, ylabel=label, xscale="log")
        axis.set_xticks([table.x for table in tables], labels=[f"{table.x:g}" for table in tables])
        axis.xaxis.set_minor_locator(_pyplot().NullLocator())
        if axis.get_ylim()[1] > 100 * min(min(line.get_ydata()) for line in axis.lines):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(linewidth=0.3)
    axes[0][0].legend(fontsize=7)
    return _save(figure, path)
