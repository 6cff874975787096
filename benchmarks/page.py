"""Write docs/benchmarks.md, docs/benchmarks-detail.md and their pictures from the JSON results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import plots
from .reports import ROOT, Report, Table, markdown, ratio, read, shown, verdict_table
from .runner import Result
from .sections import DETAIL, PAGES, Page, Section

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
DEVICES = ("cpu", "cuda")
Reports = Mapping[str, Report]  # by job, with @cuda behind it for a GPU's


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


def report_of(section: Section, device: str, reports: Reports) -> Report | None:
    """Return the report that a section shows, None where there are no results."""
    return reports.get(f"{section.job}@cuda" if device == "cuda" else section.job)


def link(page: Page, job: str, device: str, reports: Reports) -> str:
    """Return a link to the section of a job on a page, or to the page where the job has no results."""
    own = next(section for section in page.sections if section.job == job)
    if report_of(own, device, reports) is None:
        return f"[{page.title}]({page.file})"
    return f"[{own.heading(device)}]({page.file}#{own.anchor(device)})"


def section_text(section: Section, device: str, reports: Reports, pictures: Path) -> str:
    """Return a section's Markdown, its pictures drawn on the way; there must be results."""
    report = report_of(section, device, reports)
    parts = [f"## {section.heading(device)}", section.text]
    if section.verdicts and report.verdicts:
        parts += verdict_parts(report, device, reports)
    if section.tables:
        parts += [f"### {grid.title}\n\n{grid.markdown()}" for grid in report.grids]
        parts += table_parts(section.job, device, report, pictures)
    parts.append(f"*{report.when}, `{report.command}`. {machine_line(report)}*")
    return "\n\n".join(parts)


def verdict_parts(report: Report, device: str, reports: Reports) -> list[str]:
    """Return the acceptance table, and where to read on."""
    parts = [verdict_table(report.verdicts)]
    if not all(verdict.passed for verdict in report.verdicts):
        reasons = link(DETAIL, "hot_spots", device, reports)
        parts.append(
            f"A row that fails stays in the table with the best value reached. What keeps a step long: {reasons}."
        )
    return [*parts, f"The measurements: {link(DETAIL, 'acceptance', device, reports)}."]


def table_parts(job: str, device: str, report: Report, pictures: Path) -> list[str]:
    """Return a report's tables with their pictures."""
    name = _file(job, device)
    if job == "growth":
        return curves(report.tables, name, pictures)
    parts = []
    for number, table in enumerate(report.tables):
        parts += [f"### {table.title}", markdown(table)]
        if job.startswith(("training_step", "inference")):
            parts.append(picture(plots.bars(table, pictures / f"{name}-{number}.svg"), table.title))
    return parts


def _file(job: str, device: str) -> str:
    """Return how the names of a job's pictures begin."""
    return f"benchmark-{job.replace('_', '-')}{'-cuda' if device == 'cuda' else ''}"


def picture(path: Path, title: str) -> str:
    """Return the Markdown of a picture."""
    return f"![{title}](pictures/{path.name})"


def curves(tables: Sequence[Table], name: str, pictures: Path) -> list[str]:
    """Return a picture and one table for each axis, a row for each point."""
    parts = []
    for axis in dict.fromkeys(table.axis for table in tables):
        points = [table for table in tables if table.axis == axis]
        path = plots.lines(points, pictures / f"{name}-{str(axis).split()[0]}.svg")
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


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    text = f"{shown(result.seconds)} ({ratio(result.ratio)})"
    return text if result.saved_bytes is None else f"{text}; {result.saved_bytes / 1e6:.0f} MB"


def page_text(page: Page, reports: Reports, pictures: Path) -> str:
    """Return a page's Markdown: its sections in their own order, those of a GPU after those of the CPU."""
    there = [(section, device) for device in DEVICES for section in page.sections]
    there = [(section, device) for section, device in there if report_of(section, device, reports)]
    parts = [section_text(section, device, reports, pictures) for section, device in there]
    return "\n\n".join([f"# {page.title}", page.about, *parts]) + "\n"


def render(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Write both pages and their pictures into ``docs`` from all results there are, and return the pages' paths."""
    reports = {path.stem: read(path) for path in sorted(results.glob("*.json"))}
    pictures = docs / "pictures"
    for old in pictures.glob("benchmark-*.svg"):
        old.unlink()
    for page in PAGES:
        (docs / page.file).write_text(page_text(page, reports, pictures), encoding="utf-8")
    return [docs / page.file for page in PAGES]
