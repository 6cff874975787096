"""The options of every command, spelled and checked in one way.

A command takes those on data, model and run, adds its own, and has all of them checked:

    parser = command_parser("merge", "Merge adapters into plain layers.", out=Path("runs/merge"))
    args = check_options(parser, parser.parse_args(arguments))
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.datasets import SPLITS
from ..data.surfaces import SURFACES
from ..training.base import ADAPTER_CATEGORIES, BASE_CATEGORIES, Recipe
from ..training.model import SCALES

SPECS = Path(__file__).parents[1] / "specs"
SPEC = SPECS / "rep_mona.yaml"
ALIASES = SPECS / "aliases" / "ultralytics.yaml"

OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"type": Path, "help": "MVTec AD folder, COCO JSON file or folder, or folder of labelme JSON files; without it a "
                                   "small data set is generated"},
    "split": {"choices": SPLITS, "default": "auto", "help": "take the data's own train and val, or cut by a hash (default auto)"},
    "image_folder": {"type": Path, "help": "where the images of a COCO file lie (default: looked for near it)"},
    "drop_others": {"action": "store_true", "help": "leave out boxes of classes that are not in --classes"},
    "clip": {"type": Path, "help": "folder with CLIP ViT-B/32 as transformers saves it, for text features"},
    "categories": {"nargs": "+", "metavar": "NAME", "default": (),
                   "help": "categories of an MVTec AD folder, learned together (default: all; generated: tile)"},
    "classes": {"type": Path, "help": "JSON list of class texts, such as [[\"defect\"], [\"coil\"]]; default: the data's own"},
    "train_share": {"type": float, "default": Recipe.train_share, "help": "part of each defect's images that trains (default 0.6)"},
    "min_area": {"type": int, "default": Recipe.min_area, "help": "smallest part of a mask, in pixels, that gives a box (default 25)"},
    "images": {"type": int, "default": Recipe.images, "help": "generated images per category and defect (default 30)"},
    "image_size": {"type": int, "default": Recipe.image_size,
                   "help": "height and width the images are resized to, a multiple of 32 (default 192)"},
    "data_seed": {"type": int, "default": 0, "help": "seed of generated data, split and base (default 0)"},
    "weights": {"type": Path, "help": "ultralytics weights such as yolov8s-worldv2.pt; without, a small base is trained and cached"},
    "scale": {"choices": SCALES, "default": Recipe.scale, "help": "size of the model without --weights (default n)"},
    "base_steps": {"type": int, "default": Recipe.steps, "help": "steps of that base's training (default 350)"},
    "texts": {"type": Path, "help": "text features {name: (512,)}, .safetensors or .pt; default: CLIP if cached, else by name"},
    "spec": {"type": Path, "default": SPEC, "help": "adapter specification (default specs/rep_mona.yaml)"},
    "aliases": {"type": Path, "help": "named positions of the spec (default: ultralytics' names)"},
    "names": {"nargs": "+", "default": (), "metavar": "TEXT", "help": "class texts to look for, instead of --classes"},
    "adapter": {"type": Path, "nargs": "+", "default": (), "metavar": "FILE", "help": "adapter files, .safetensors"},
    "weight_decay": {"type": float, "default": Recipe.weight_decay,
                     "help": "of weights; norms, biases and scales have none (default 0.05)"},
    "accumulation": {"type": int, "default": 1, "help": "forward passes per step (default 1)"},
    "evaluations": {"type": int, "default": 10, "help": "how often mAP is taken, evenly over the run (default %(default)s)"},
    "batch_size": {"type": int, "default": Recipe.batch_size, "help": "images per forward pass of one process (default 8)"},
    "device": {"choices": ("cpu", "auto"), "default": "auto", "help": "auto takes a GPU if there is one"},
    "precision": {"choices": ("no", "bf16", "fp16"), "default": "no", "help": "mixed precision (default no)"},
    "threads": {"type": int, "default": 0, "help": "CPU threads (default: torch's own choice)"},
    "seed": {"type": int, "default": 0, "help": "seed of adapters, order and augmentation (default 0)"},
    "out": {"type": Path, "help": "folder for the results"},
    "cache": {"type": Path, "default": Path(".cache/yolo_world"),
              "help": "folder for generated data and the base; delete it at will (default .cache/yolo_world)"},
}  # fmt: skip
"""Every shared option by its name in the namespace: what ``argparse`` is told."""

DATA_OPTIONS = (
    "data", "categories", "classes", "drop_others", "image_folder", "split", "train_share", "min_area", "image_size",
    "images", "data_seed",
)  # fmt: skip
MODEL_OPTIONS = ("weights", "scale", "texts", "clip", "base_steps")
TRAINING_OPTIONS = ("evaluations", "accumulation", "weight_decay")
RUN_OPTIONS = ("batch_size", "device", "precision", "threads", "seed", "out", "cache")

AT_LEAST_ONE = (
    "images", "image_size", "min_area", "base_steps", "batch_size", "steps", "accumulation", "evaluations",
    "checkpoint_every", "guard_streak",
)  # fmt: skip
"""Whole numbers, of the options here and of ``train``."""


def add_options(parser: argparse.ArgumentParser, title: str, names: Sequence[str], **defaults: Any) -> None:
    """Add shared options by name to a titled group of the parser; ``defaults`` replaces defaults by name."""
    group = parser.add_argument_group(title)
    for name in names:
        group.add_argument("--" + name.replace("_", "-"), **OPTIONS[name])
    parser.set_defaults(**defaults)


def command_parser(
    name: str, description: str, *, model: Sequence[str] = ("adapter",), out: Path | None = None
) -> argparse.ArgumentParser:
    """Return a command's parser with the options on data, model and run.

    Args:
        name: the command's.
        description: of the command.
        model: further options on the model.
        out: default of ``--out``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.yolo_world {name}", description=description)
    add_options(parser, "data", DATA_OPTIONS)
    add_options(parser, "model", (*MODEL_OPTIONS, *model))
    add_options(parser, "run", RUN_OPTIONS, out=out)
    return parser


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the namespace with tuples for lists, or exit with a message if a shared option is out of range."""
    for name in AT_LEAST_ONE:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if getattr(args, "image_size", 32) % 32:
        parser.error("--image-size must be a multiple of 32, the detector's largest stride")
    if not 0 < getattr(args, "train_share", 0.5) < 1:
        parser.error("--train-share must lie between 0 and 1")
    if getattr(args, "images", 2) < 2:
        parser.error("--images must be at least 2: one to train and one to test")
    for name in ("categories", "base_categories", "adapter"):
        if hasattr(args, name):
            setattr(args, name, tuple(getattr(args, name)))
    if hasattr(args, "categories"):
        check_categories(parser, args)
    return args


def check_categories(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit if a category is named twice, cannot be generated, or is one the generated base has learned."""
    names = args.categories
    if len(set(names)) != len(names):
        parser.error("--categories names one twice")
    if args.data is not None:
        return
    unknown = [name for name in names if name not in SURFACES]
    if unknown:
        parser.error(f"no generated category {', '.join(unknown)}; there are {', '.join(SURFACES)}")
    shared = ", ".join(sorted(set(names) & set(getattr(args, "base_categories", BASE_CATEGORIES))))
    if not shared or args.weights is not None:
        return
    if hasattr(args, "base_categories"):
        parser.error(f"{shared} cannot be both in --categories and in --base-categories")
    parser.error(f"the generated base has learned {shared}; take one of {', '.join(ADAPTER_CATEGORIES)}")
