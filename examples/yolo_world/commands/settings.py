"""The demo's options: what each means, its default, and what ``--quick`` makes of it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..data.surfaces import SURFACES
from ..training.model import SCALES

SPEC = Path(__file__).parents[1] / "specs" / "rep_mona.yaml"
BASE_CATEGORIES = ("metal", "fabric", "wood", "leather", "stone")
ADAPTER_CATEGORIES = ("tile", "washer")


@dataclasses.dataclass(frozen=True)
class Options:
    """Every option of the demo; ``python -m examples.yolo_world.demo --help`` explains them."""

    data: Path | None
    categories: tuple[str, ...]
    base_categories: tuple[str, ...]
    weights: Path | None
    texts: Path | None
    spec: Path
    out: Path
    cache: Path
    scale: str
    seed: int
    quick: bool
    device: str
    precision: str
    threads: int
    image_size: int
    images: int
    train_share: float
    min_area: int
    batch_size: int
    accumulation: int
    base_steps: int
    steps: int
    base_lr: float
    adapter_lr: float
    full_lr: float
    weight_decay: float
    evaluations: int


QUICK = {"image_size": 96, "images": 5, "batch_size": 4, "base_steps": 10, "steps": 6, "evaluations": 1}
"""What ``--quick`` sets unless the option is given as well."""

DEFAULTS = {"image_size": 192, "images": 30, "batch_size": 8, "base_steps": 350, "steps": 150, "evaluations": 4}
"""What the same options are otherwise."""


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to learn from."""
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="folder in MVTec AD's layout; without it a small data set is generated")
    add("--categories", nargs="+", help="the categories that get an adapter (two; default: the first two of --data)")
    add("--base-categories", nargs="+", default=BASE_CATEGORIES, choices=list(SURFACES), metavar="NAME",
        help=f"generated categories the base learns without --weights (default {' '.join(BASE_CATEGORIES)})")  # fmt: skip
    add("--images", type=int, help="generated images per category and defect (default 30)")
    add("--image-size", type=int, help="height and width the images are resized to (default 192, a multiple of 32)")
    add("--train-share", type=float, default=0.6, help="part of each defect's images that trains (default 0.6)")
    add("--min-area", type=int, default=25, help="smallest part of a mask, in pixels, that gives a box (default 25)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, adapter and device."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--weights",
        type=Path,
        help="ultralytics weights such as yolov8s-worldv2.pt; without, a small base is trained first",
    )
    add(
        "--texts",
        type=Path,
        help="text features {name: (512,)}, .safetensors or .pt; default: CLIP if cached, else by name",
    )
    add("--scale", choices=SCALES, default="n", help="size of the model without --weights (default n)")
    add("--spec", type=Path, default=SPEC, help="adapter specification (default specs/rep_mona.yaml)")
    add("--device", choices=("cpu", "auto"), default="auto", help="auto takes a GPU if there is one")
    add(
        "--precision",
        choices=("no", "bf16", "fp16"),
        default="no",
        help="mixed precision of the trainings (default no)",
    )
    add("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how long and how fast to train."""
    add = parser.add_argument_group("training").add_argument
    add("--base-steps", type=int, help="steps of the base's training (default 350)")
    add("--steps", type=int, help="steps of each adapter and of each full fine-tuning (default 150)")
    add("--batch-size", type=int, help="images per forward pass (default 8)")
    add("--accumulation", type=int, default=1, help="forward passes per step (default 1)")
    add("--base-lr", type=float, default=2e-3, help="learning rate of the base's training")
    add("--adapter-lr", type=float, default=4e-3, help="learning rate of the adapters")
    add("--full-lr", type=float, default=1e-3, help="learning rate of full fine-tuning")
    add("--weight-decay", type=float, default=0.05)
    add("--evaluations", type=int, help="points on the mAP curves (default 4)")
    add("--seed", type=int, default=0, help="seed of data, split, weights, order and augmentation")


def make_parser() -> argparse.ArgumentParser:
    """Return the demo's command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.yolo_world.demo",
        description="Train two adapters on one frozen YOLO-World, compare with full fine-tuning, swap and merge them.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results (default runs/demo)"
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/yolo_world"),
                        help="folder for generated data and the base; delete it at will (default .cache/yolo_world)")  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="every step on a tiny scale, for tests; the numbers mean nothing"
    )
    add_data_options(parser)
    add_model_options(parser)
    add_training_options(parser)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    values = vars(parser.parse_args(arguments))
    for name, default in (QUICK if values["quick"] else DEFAULTS).items():
        values[name] = default if values[name] is None else values[name]
    if values["categories"] is None:
        values["categories"] = () if values["data"] else ADAPTER_CATEGORIES
    if values["quick"] and values["base_categories"] == BASE_CATEGORIES:
        values["base_categories"] = BASE_CATEGORIES[:2]
    for name in (
        "image_size",
        "images",
        "batch_size",
        "accumulation",
        "base_steps",
        "steps",
        "min_area",
        "evaluations",
    ):
        if values[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if values["image_size"] % 32:
        parser.error("--image-size must be a multiple of 32, the detector's largest stride")
    if not 0 < values["train_share"] < 1:
        parser.error("--train-share must lie between 0 and 1")
    if values["images"] < 2:
        parser.error("--images must be at least 2: one to train and one to test")
    for name in ("categories", "base_categories"):
        values[name] = tuple(values[name])
    if values["categories"] and len(set(values["categories"])) != 2:
        parser.error("--categories wants two different categories")
    if not values["data"]:
        check_generated(parser, values["categories"], values["base_categories"], values["weights"])
    return Options(**values)


def check_generated(
    parser: argparse.ArgumentParser, categories: Sequence[str], base: Sequence[str], weights: Path | None
) -> None:
    """Exit if a category cannot be generated, or if the base would learn what the adapters are tested on."""
    unknown = [name for name in categories if name not in SURFACES]
    if unknown:
        parser.error(f"no generated category {', '.join(unknown)}; there are {', '.join(SURFACES)}")
    shared = set(categories) & set(base)
    if shared and weights is None:
        parser.error(f"{', '.join(sorted(shared))} cannot be both in --categories and in --base-categories")
