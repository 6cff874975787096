"""Run a detector over a data set: its boxes, and its mean average precision by torchmetrics and pycocotools.

    python -m examples.yolo_world.evaluate --adapter runs/tile/last.safetensors
    python -m examples.yolo_world.evaluate --data DIR --categories screw --weights W --adapter A B --out runs/scores

The command gives COCO's numbers and those of each class, for the bare base and for each adapter.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .images import DetectionImages
from .model import decode, use_classes


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean average precision over classes: at IoU 0.5, over IoU 0.5 to 0.95, and at 0.5 for each class."""

    map50: float
    map50_95: float
    map50_by_class: dict[str, float]


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


def predict(
    model: nn.Module, data: DetectionImages, texts: Tensor, *, batch_size: int = 8, title: str | None = None
) -> list[Tensor]:
    """Return the boxes of every image of ``data`` in order, on the CPU; puts the model in eval mode.

    Boxes are ``(n, 6)``: x1 y1 x2 y2 in pixels of the resized image, confidence, class. With a ``title`` there is a
    progress bar.
    """
    use_classes(model, texts).eval()
    device = next(model.parameters()).device
    found: list[Tensor] = []
    starts = range(0, len(data), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", disable=title is None, leave=False):
        pixels = torch.stack([data.loaded[index][0] for index in range(start, min(start + batch_size, len(data)))])
        found += [boxes.cpu() for boxes in decode(model, pixels.to(device).float() / 255)]
    return found


def corners(boxes: Tensor, size: int) -> Tensor:
    """Return centre-x centre-y width height in [0, 1] as x1 y1 x2 y2 in pixels of an image of ``size``."""
    half = boxes[:, 2:] / 2
    return torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1) * size


def targets_of(data: DetectionImages) -> list[dict[str, Tensor]]:
    """Return the true boxes and labels of every image, as torchmetrics wants them."""
    return [
        {"boxes": corners(boxes, data.size), "labels": labels}
        for boxes, labels in zip(data.boxes, data.labels, strict=True)
    ]


def score(found: list[Tensor], data: DetectionImages) -> Scores:
    """Return the mean average precision of boxes as ``predict`` gives them; a class without true boxes is left out."""
    from torchmetrics.detection.mean_ap import MeanAveragePrecision

    metric = MeanAveragePrecision(
        box_format="xyxy", iou_type="bbox", class_metrics=False, backend="pycocotools", sync_on_compute=False
    )
    metric.warn_on_many_detections = False
    predictions = [{"boxes": boxes[:, :4], "scores": boxes[:, 4], "labels": boxes[:, 5].long()} for boxes in found]
    targets = targets_of(data)
    metric.update(predictions, targets)
    both = metric.compute()
    by_class = {}
    for label, name in enumerate(data.classes):
        single = MeanAveragePrecision(
            box_format="xyxy", iou_type="bbox", iou_thresholds=[0.5], backend="pycocotools", sync_on_compute=False
        )
        single.warn_on_many_detections = False
        single.update(only_label(predictions, label), only_label(targets, label))
        by_class[name] = max(float(single.compute()["map"]), 0.0)
    return Scores(max(float(both["map_50"]), 0.0), max(float(both["map"]), 0.0), by_class)


def only_label(items: list[dict[str, Tensor]], label: int) -> list[dict[str, Tensor]]:
    """Return the items with only the entries of one label."""
    return [{key: value[item["labels"] == label] for key, value in item.items()} for item in items]


def evaluate(model: nn.Module, data: DetectionImages, texts: Tensor, *, batch_size: int = 8) -> Scores:
    """Return the model's scores on ``data``; puts the model in eval mode."""
    return score(predict(model, data, texts, batch_size=batch_size), data)


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

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [line(["model", *COCO_NUMBERS.values()]), "|" + " --- |" * (1 + len(COCO_NUMBERS))]
    lines += [line([title, *map(cell, each.numbers.values())]) for title, each in reports.items()]
    lines += ["", line(["class", "images", "boxes", *(f"{title}: mAP50 / mAP50-95" for title in reports)])]
    lines.append("|" + " --- |" * (3 + len(reports)))
    for rows in zip(*(each.classes for each in reports.values()), strict=True):
        scores = [f"{cell(row.map50)} / {cell(row.map50_95)}" for row in rows]
        lines.append(line([rows[0].name, str(rows[0].images), str(rows[0].boxes), *scores]))
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    from .common import DATA_OPTIONS, MODEL_OPTIONS, RUN_OPTIONS, add_options

    parser = argparse.ArgumentParser(
        prog="python -m examples.yolo_world.evaluate",
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
    import convpeft

    from .common import load_adapters, load_base, load_data, open_session
    from .report import versions, write_json

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
    table = markdown(reports)
    print(f"\n{table}\n", flush=True)
    if args.out is not None:
        (args.out / "scores.md").write_text(table + "\n", encoding="utf-8")
        results: dict[str, Any] = {
            "reports": reports, "data": data.source, "texts": data.features.source, "options": vars(args), "versions": versions(),
        }  # fmt: skip
        write_json(Path(args.out) / "scores.json", results)
        session.say(f"written to {args.out}")
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    from .common import check_options, run_command

    parser = make_parser()
    args = check_options(parser, parser.parse_args(arguments))
    return run_command(lambda: execute(args))


if __name__ == "__main__":
    sys.exit(main())
