"""Write docs/benchmarks.md and its pictures from the JSON results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import plots
from .reports import ROOT, Report, Table, markdown, ratio, read, shown, verdict_table

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "pictures"
ABOUT = """# Benchmarks

`make benchmarks` measured all of this and wrote this page (`python -m benchmarks` where the dependencies are there
already; `python -m benchmarks --render` writes the page anew from the results in `benchmarks/results`). Each script
answers one question and takes `--help`.

How it is measured:

* All cases of a table run **side by side** in one process: every round runs each case once, in an order drawn anew. A
  case is judged by its time divided by the baseline's time of the same round; the tables show the median of that,
  and the first and third quartile. `time` is the median of the case's own times; on a busy machine two of those need
  not have the ratio that the rounds show.
* `CPU time ÷` is the same ratio of the process's CPU time, on which other processes have less influence.
* **Kept for backward** is the most that autograd holds for the backward pass at one time, counted through
  `torch.autograd.graph.saved_tensors_hooks`; a storage counts once, and parameters do not count. **Peak** is the most
  that torch's allocator held beyond what it held before the step: activations, gradients, buffers.
* A **training step** is forward pass, ultralytics' own loss, and backward pass of YOLO-World-v2 with random weights.
  Full fine-tuning trains all but the fixed sum of DFL; nobody adapts that one.
* **Peers** sit on the same convolutions at the same rank, each at the setting that was fastest for it: BatchNorms of
  the frozen base in eval mode, no dropout, peft without its wrapper, LyCORIS in bypass mode.
"""
MISSED = (
    "A missed row stays in the table with the best that was reached; what stands in the way of a shorter step is in "
    "[Where a step's time goes](#{anchor})."
)
SECTIONS: dict[str, tuple[str, str]] = {
    "acceptance": (
        "Acceptance",
        "What issue 5 of this project asks for, row by row, judged by the wall clock's median.",
    ),
    "training_step": ("Training step", "All kinds and peers."),
    "training_step-m": ("Training step, M", "The usual cases on the next larger model."),
    "training_step-l": ("Training step, L", "The usual cases on the large model."),
    "training_step-compiled": ("Training step, compiled", "The same with the network in `torch.compile`."),
    "hot_spots": (
        "Where a step's time goes",
        "torch's profiler over the same steps: what adapters save and what they add, relative to full fine-tuning. "
        "Profiling lengthens small operations; the tables above have the true times.",
    ),
    "hot_spots-l": (
        "Where a step's time goes, L",
        "The row of the acceptance table with the least room: complete runs of that table on one machine gave 0.76, 0.80, 0.81, 0.76 and "
        "0.79 (2026-11-25), and which one it is depends more on full fine-tuning than on LoRA: where its memory comes from the system "
        "anew each step, that step takes longer (0.94 to 1.00 s; with glibc told to keep what is freed 0.89 s, and the row 0.81). "
        "The frozen model's own passes are about two thirds of a full step (forward, and back to the input), and A's convolutions and both factors' products come on top. With few "
        "channels these run at a fraction of a large convolution's speed.",
    ),
    "inference": ("Inference", "The base runs as two copies: what the second one shows beside 1.00 is noise."),
    "inference-compiled": ("Inference, compiled", "The same with the network in `torch.compile`."),
    "handling": (
        "Inject, eject, merge, save, load, swap",
        "convpeft's merge works in float64 and probes every layer, and its files are bound to the base by digests; "
        "the peers do neither.",
    ),
    "import_time": ("Import", "Fresh processes that import torch first."),
    "growth": ("Growth", "LoRA as model, rank, images, or the number of adapters grow."),
}


def machine_line(report: Report) -> str:
    """Return one sentence on what ran a report."""
    own = report.machine
    versions = ", ".join(f"{package} {number}" for package, number in own["versions"].items() if number)
    gpu = f", {own['gpu']} (CUDA {own['cuda']})" if own["gpu"] and report.settings.get("device") == "cuda" else ""
    load = f", load {own['load before']} before it began" if own["load before"] is not None else ""
    return (
        f"{own['processor']}, {own['cores']} cores shared with other work{load}; {own['threads']} threads{gpu}; "
        f"Python {own['python']}, {versions}; commit {own['commit']}; seed {report.settings.get('seed')}."
    )


def section(name: str, report: Report, pictures: Path) -> str:
    """Return a report's section, its pictures drawn on the way."""
    kind, _, device = name.partition("@")
    title, text = SECTIONS[kind]
    parts = [f"## {title}{' on a GPU' if device == 'cuda' else ''}", text]
    if report.verdicts:
        parts.append(verdict_table(report.verdicts))
        if not all(verdict.passed for verdict in report.verdicts):
            parts.append(MISSED.format(anchor=f"where-a-steps-time-goes{'-on-a-gpu' if device else ''}"))
    parts += [f"### {grid.title}\n\n{grid.markdown()}" for grid in report.grids]
    if kind == "growth":
        parts += curves(report.tables, name, pictures)
    else:
        for number, table in enumerate(report.tables):
            parts += [f"### {table.title}", markdown(table)]
            if kind.startswith(("training_step", "inference")):
                parts.append(picture(plots.bars(table, pictures / f"{_file(name)}-{number}.svg"), table.title))
    parts.append(f"*{report.when}, `{report.command}`. {machine_line(report)}*")
    return "\n\n".join(parts)


def _file(name: str) -> str:
    return f"benchmark-{name.replace('_', '-').replace('@', '-')}"


def picture(path: Path, title: str) -> str:
    """Return the Markdown of a picture."""
    return f"![{title}](pictures/{path.name})"


def curves(tables: Sequence[Table], name: str, pictures: Path) -> list[str]:
    """Return a picture and one table for each axis, a row for each point."""
    parts = []
    for axis in dict.fromkeys(table.axis for table in tables):
        points = [table for table in tables if table.axis == axis]
        path = plots.lines(points, pictures / f"{_file(name)}-{str(axis).split()[0]}.svg")
        parts += [f"### By {axis}", f"{points[0].title} … {points[-1].title}.", picture(path, str(axis)), pivot(points)]
        parts += [f"{point.x:g}: {note}" for point in points for note in point.notes]
    return parts


def pivot(points: Sequence[Table]) -> str:
    """Return a table with a row for each point and a column for each case: time, its ratio, and bytes kept."""
    names = list(dict.fromkeys(result.name for point in points for result in point.results))
    lines = [f"| {points[0].axis} | {' | '.join(names)} |", f"| ---: |{' ---: |' * len(names)}"]
    for point in points:
        own = {result.name: result for result in point.results}
        lines.append(f"| {point.x:g} | {' | '.join(_cell(own.get(name)) for name in names)} |")
    legend = f"Each cell: time, and in brackets relative to {names[0]}"
    if any(result.saved_bytes is not None for point in points for result in point.results):
        legend += "; then what is kept for backward"
    return "\n".join([*lines, "", f"{legend}."])


def _cell(result: object) -> str:
    if result is None:
        return "–"
    text = f"{shown(result.seconds)} ({ratio(result.ratio)})"
    return text if result.saved_bytes is None else f"{text}; {result.saved_bytes / 1e6:.0f} MB"


def page(reports: dict[str, Report], pictures: Path) -> str:
    """Return the whole page: sections in their own order, those of a GPU after those of the CPU."""
    order = [f"{kind}{device}" for device in ("", "@cuda") for kind in SECTIONS]
    return "\n\n".join([ABOUT.strip(), *(section(n, reports[n], pictures) for n in order if n in reports)]) + "\n"


def render(results: Path = RESULTS, target: Path = PAGE, pictures: Path = PICTURES) -> Path:
    """Write the page from all results there are, and return its path."""
    reports = {path.stem: read(path) for path in sorted(results.glob("*.json"))}
    for old in pictures.glob("benchmark-*.svg"):
        old.unlink()
    target.write_text(page(reports, pictures), encoding="utf-8")
    return target
