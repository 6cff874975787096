"""COCO's numbers and those of each class, for the bare base and for each adapter.

python -m examples.yolo_world evaluate --adapter runs/tile/last.safetensors
python -m examples.yolo_world evaluate --data DIR --categories screw --weights W --adapter A B --out runs/scores
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import convpeft

from ..training.scores import COCO_NUMBERS, Report, predict, report
from .options import check_options, command_parser
from .report import table, versions, write_json
from .session import load_adapters, load_base, load_data, open_session, run_command


def markdown(reports: dict[str, Report]) -> str:
    """Return reports by title as two Markdown tables: COCO's numbers, and mAP50 / mAP50-95 of each class."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    numbers = [[title, *map(cell, each.numbers.values())] for title, each in reports.items()]
    classes = []
    for rows in zip(*(each.classes for each in reports.values()), strict=True):
        scores = [f"{cell(row.map50)} / {cell(row.map50_95)}" for row in rows]
        classes.append([rows[0].name, str(rows[0].images), str(rows[0].boxes), *scores])
    titles = ["class", "images", "boxes", *(f"{title}: mAP50 / mAP50-95" for title in reports)]
    return f"{table(['model', *COCO_NUMBERS.values()], numbers)}\n\n{table(titles, classes)}"


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = command_parser(
        "evaluate", "COCO mAP, over all classes and for each, of the base and of adapters on the test images."
    )
    parser.add_argument("--together", action="store_true", help="all adapters at once (their sum), not one by one")
    return parser


def choices_of(names: Sequence[str], together: bool) -> dict[str, tuple[str, ...]]:
    """Return what to run by title: each adapter on its own, or all of them together.

    Example:
        >>> choices_of(["a", "b"], together=True)
        {'a + b': ('a', 'b')}
    """
    if together and names:
        return {" + ".join(names): tuple(names)}
    return {name: (name,) for name in names}


def execute(args: argparse.Namespace) -> dict[str, Report]:
    """Evaluate what the options ask for, print the tables, write them to ``--out`` if given, and return the reports."""
    session = open_session(args)
    data = load_data(args, session.say)
    model = load_base(args, data.features, session).model
    names = load_adapters(model, args.adapter)
    reports: dict[str, Report] = {}
    for title, active in {"(base)": (), **choices_of(names, args.together)}.items():
        if names:
            convpeft.set_active(model, active or None)
        found = predict(model, data.test, data.texts, batch_size=args.batch_size, title=title)
        reports[title] = report(found, data.test)
    tables = markdown(reports)
    print(f"\n{tables}\n", flush=True)
    if args.out is not None:
        (args.out / "scores.md").write_text(tables + "\n", encoding="utf-8")
        results: dict[str, Any] = {
            "reports": reports, "data": data.source, "texts": data.features.source, "options": vars(args), "versions": versions(),
        }  # fmt: skip
        write_json(args.out / "scores.json", results)
        session.say(f"written to {args.out}")
    return reports


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    return check_options(parser, parser.parse_args(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)
