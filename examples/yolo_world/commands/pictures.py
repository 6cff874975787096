"""Pictures of a run, drawn by matplotlib without a screen: boxes side by side, and the curves of the trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

from ..data.images import DetectionImages
from ..training.scores import targets_of
from ..training.trainer import Curves

COLOURS = ("tab:red", "tab:cyan", "tab:orange", "tab:pink", "tab:green", "tab:purple", "tab:olive", "tab:brown")


def draw_boxes(axes: Any, image: Tensor, boxes: Tensor, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Draw an image, uint8 ``(3, height, width)``, and boxes, ``(n, 4)`` x1 y1 x2 y2, each with its label."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for (left, top, right, bottom), label, colour in zip(boxes.tolist(), labels, colours, strict=True):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2))
        axes.text(
            left,
            top - 1,
            label,
            color="white",
            fontsize=5,
            va="bottom",
            bbox={"facecolor": colour, "pad": 0.5, "lw": 0},
        )


def spread(data: DetectionImages, count: int) -> list[int]:
    """Return the numbers of up to ``count`` images, taken from each defect in turn."""
    by_defect: dict[str | None, list[int]] = {}
    for index, sample in enumerate(data.samples):
        by_defect.setdefault(sample.defect, []).append(index)
    rows = [indices for defect, indices in sorted(by_defect.items(), key=lambda item: item[0] or "~")]
    turns = [row[turn] for turn in range(max(map(len, rows), default=0)) for row in rows if turn < len(row)]
    return turns[:count]


def save_comparison(
    path: Path, data: DetectionImages, columns: dict[str, list[Tensor]], *, count: int = 6, least: float = 0.25
) -> None:
    """Write a picture with one row per image: the truth, then the boxes of each column above the ``least`` confidence.

    Args:
        path: PNG to write.
        data: the images.
        columns: title to boxes of all images, as ``scores.predict`` gives them.
        count: number of rows.
        least: confidence below which a box is not drawn.
    """
    chosen, truth = spread(data, count), targets_of(data)
    figure, grid = plt.subplots(
        len(chosen), 1 + len(columns), figsize=(2.4 * (1 + len(columns)), 2.4 * len(chosen)), squeeze=False
    )
    for row, index in zip(grid, chosen, strict=True):
        image, target = data.loaded[index][0], truth[index]
        labels = target["labels"].tolist()
        draw_boxes(row[0], image, target["boxes"], [data.classes[i] for i in labels], [COLOURS[i % 8] for i in labels])
        for axes, found in zip(row[1:], columns.values(), strict=True):
            boxes = found[index][found[index][:, 4] >= least]
            classes = boxes[:, 5].long().tolist()
            names = [
                f"{data.classes[i]} {confidence:.2f}"
                for i, confidence in zip(classes, boxes[:, 4].tolist(), strict=True)
            ]
            draw_boxes(axes, image, boxes[:, :4], names, [COLOURS[i % 8] for i in classes])
    for axes, title in zip(grid[0], ("ground truth", *columns), strict=True):
        axes.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of the last ``width`` values at each place."""
    return [
        sum(values[max(0, i + 1 - width) : i + 1]) / len(values[max(0, i + 1 - width) : i + 1])
        for i in range(len(values))
    ]


def save_curves(path: Path, curves: dict[str, Curves], *, starts: dict[str, float]) -> None:
    """Write the curves of some trainings: loss per image (smoothed), and mAP50 on the test images.

    Args:
        path: PNG to write.
        curves: training by title.
        starts: the base's mAP50 by the same titles, which is where each mAP curve begins.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for title, each in curves.items():
        dashes = "--" if title.startswith("full") else "-"
        left.plot(smoothed(each.losses, 10), dashes, label=title, linewidth=1.2)
        steps = [0, *(step for step, _ in each.scores)]
        right.plot(
            steps,
            [starts[title], *(scores.map50 for _, scores in each.scores)],
            dashes,
            marker="o",
            markersize=3,
            label=title,
        )
    left.set(xlabel="step", ylabel="loss per image", yscale="log", title="training loss (mean of 10 steps)")
    right.set(xlabel="step", ylabel="mAP50", ylim=(0, 1), title="mAP50 on the category's own test images")
    for axes in (left, right):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
