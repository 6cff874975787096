"""COCO's numbers and those of each class, for the bare base and for each adapter.

python -m examples.yolo_world evaluate --adapter runs/tile/last.safetensors
python -m examples.yolo_world evaluate --data DIR --categories screw --weights W --adapter A B --out runs/scores
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import convpeft

from ..data.images import DetectionImages
from ..training.scores import only_label, predict, targets_of
from .options import DATA_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS, add_options, check_options
from .report import table, versions, write_json
from .session import load_adapters, load_base, load_data, open_session, run_command

COCO_NUMBERS = {
    "map": "mAP50-95", "map_50": "mAP50", "map_75": "mAP75", "map_small": "mAP small", "map_medium": "mAP medium",
    "map_large": "mAP large", "mar_1": "recall 1", "mar_10": "recall 10", "mar_100": "recall 100",
}  # fmt: skip
"""COCO's numbers by torchmetrics' names, and what they are called in the table."""


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """One class of the test images: images that show it, true boxes, and its average precision (None without boxes)."""

    name: str
    images: int
    boxes: int
    map50: float | None
    map50_95: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """COCO's numbers by name, None where there is nothing to count, and the scores of each class."""

    numbers: dict[str, float | None]
    classes: tuple[ClassScores, ...]


def report(found: list[Tensor], data: DetectionImages) -> Report:
    """Return COCO's numbers, over all classes and for each, of boxes as ``predict`` gives them.

    Small, medium and large are COCO's (below 32 x 32, below 96 x 96, above), in pixels of the resized image.
    """
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    def measured(items: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> dict[str, float | None]:
        metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox", backend="pycocotools")
        metric.warn_on_many_detections = False
        metric.update(items, truth)
        values = metric.compute()
        return {name: None if float(values[name]) < 0 else float(values[name]) for name in COCO_NUMBERS}

    predictions = [{"boxes": boxes[:, :4], "scores": boxes[:, 4], "labels": boxes[:, 5].long()} for boxes in found]
    targets = targets_of(data)
    classes = []
    for label, name in enumerate(data.classes):
        truth = only_label(targets, label)
        counts = [len(item["labels"]) for item in truth]
        own = measured(only_label(predictions, label), truth) if sum(counts) else dict.fromkeys(COCO_NUMBERS)
        classes.append(ClassScores(name, sum(map(bool, counts)), sum(counts), own["map_50"], own["map"]))
    return Report(measured(predictions, targets), tuple(classes))


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
    parser = argparse.ArgumentParser(
        prog="python -m examples.yolo_world evaluate",
        description="COCO mAP, over all classes and for each, of the base and of adapters on the test images.",
    )
    add_options(parser, "data", DATA_OPTIONS)
    add_options(parser, "model", (*MODEL_OPTIONS, "adapter"))
    add_options(parser, "run", RUN_OPTIONS)
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
