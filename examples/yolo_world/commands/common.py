"""What every command shares: options spelled the same way, and the base, data, texts and adapters they ask for.

A command picks options by name and loads from them:

    parser = argparse.ArgumentParser(prog="python -m examples.yolo_world evaluate", description="...")
    add_options(parser, "data", DATA_OPTIONS)
    add_options(parser, "model", (*MODEL_OPTIONS, "adapter"))
    add_options(parser, "run", RUN_OPTIONS)
    args = check_options(parser, parser.parse_args(arguments))
    session = open_session(args)
    data = load_data(args, session.say)
    model = load_base(args, data.features, session).model
    load_adapters(model, args.adapter)
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import convpeft

from ..data.augment import augmentation_of
from ..data.datasets import SPLITS, open_dataset
from ..data.generate import DEFECTS
from ..data.images import DataError, DetectionImages
from ..data.surfaces import SURFACES
from ..data.texts import TextError, TextFeatures, load_class_features, load_class_texts
from ..training.base import Base, fill_cache, generated_data, get_base, is_cached
from ..training.checkpoint import CheckpointError
from ..training.engine import make_accelerator
from ..training.model import SCALES, WeightsError, prepare_ultralytics
from ..training.parallel import ParallelError
from .settings import ADAPTER_CATEGORIES, BASE_CATEGORIES, SPEC, Options
from .settings import DEFAULTS as DEMO_DEFAULTS

SPECS = SPEC.parent
ALIASES = SPECS / "aliases" / "ultralytics.yaml"


class CommandError(ValueError):
    """Options that do not go together here: says which, why, and what to do."""


ERRORS = (
    DataError, TextError, WeightsError, CheckpointError, CommandError, ParallelError, convpeft.ConvPeftError,
    FloatingPointError,
)  # fmt: skip
"""What a command reports as ``error: <text>`` with status 2; anything else is a defect and shows its traceback."""

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
    "train_share": {"type": float, "default": 0.6, "help": "part of each defect's images that trains (default 0.6)"},
    "min_area": {"type": int, "default": 25, "help": "smallest part of a mask, in pixels, that gives a box (default 25)"},
    "images": {"type": int, "default": DEMO_DEFAULTS["images"], "help": "generated images per category and defect (default 30)"},
    "image_size": {"type": int, "default": DEMO_DEFAULTS["image_size"],
                   "help": "height and width the images are resized to, a multiple of 32 (default 192)"},
    "data_seed": {"type": int, "default": 0, "help": "seed of generated data, split and base (default 0)"},
    "weights": {"type": Path, "help": "ultralytics weights such as yolov8s-worldv2.pt; without, a small base is trained and cached"},
    "scale": {"choices": SCALES, "default": "n", "help": "size of the model without --weights (default n)"},
    "base_steps": {"type": int, "default": DEMO_DEFAULTS["base_steps"], "help": "steps of that base's training (default 350)"},
    "texts": {"type": Path, "help": "text features {name: (512,)}, .safetensors or .pt; default: CLIP if cached, else by name"},
    "spec": {"type": Path, "default": SPEC, "help": "adapter specification (default specs/rep_mona.yaml)"},
    "aliases": {"type": Path, "help": "named positions of the spec (default: ultralytics' names)"},
    "adapter": {"type": Path, "nargs": "+", "default": (), "metavar": "FILE", "help": "adapter files, .safetensors"},
    "batch_size": {"type": int, "default": DEMO_DEFAULTS["batch_size"],
                   "help": "images per forward pass of one process (default 8)"},
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
RUN_OPTIONS = ("batch_size", "device", "precision", "threads", "seed", "out", "cache")


def add_options(parser: argparse.ArgumentParser, title: str, names: Sequence[str], **defaults: Any) -> None:
    """Add shared options by name to a titled group of the parser; ``defaults`` replaces defaults by name."""
    group = parser.add_argument_group(title)
    for name in names:
        group.add_argument("--" + name.replace("_", "-"), **OPTIONS[name])
    parser.set_defaults(**defaults)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the namespace with tuples for lists, or exit with a message if a shared option is out of range."""
    for name in ("images", "image_size", "min_area", "base_steps", "batch_size"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if getattr(args, "image_size", 32) % 32:
        parser.error("--image-size must be a multiple of 32, the detector's largest stride")
    if not 0 < getattr(args, "train_share", 0.5) < 1:
        parser.error("--train-share must lie between 0 and 1")
    if getattr(args, "images", 2) < 2:
        parser.error("--images must be at least 2: one to train and one to test")
    for name in ("categories", "adapter"):
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
    shared = sorted(set(names) & set(BASE_CATEGORIES))
    if shared and getattr(args, "weights", None) is None:
        parser.error(f"the generated base has learned {', '.join(shared)}; take one of {', '.join(ADAPTER_CATEGORIES)}")


@dataclasses.dataclass
class Session:
    """What a command runs with: the device and processes, where it writes, and how it speaks."""

    accelerator: Accelerator
    out: Path | None
    say: Callable[[str], None]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.accelerator.is_main_process


def open_session(args: argparse.Namespace, *, make_out: bool = True) -> Session:
    """Return the session of a command: threads set, ultralytics kept offline, accelerator made, ``--out`` there."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare_ultralytics()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.precision == "fp16" and (args.device == "cpu" or not torch.cuda.is_available()):
        raise CommandError("--precision fp16 needs a GPU, and none is used here; take bf16 or no.")
    started = time.perf_counter()
    accelerator = make_accelerator(args.device, args.precision, 1)
    out = getattr(args, "out", None)
    if out is not None and make_out and accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        """Print a line with the minutes and seconds since the start, from the main process only."""
        if accelerator.is_main_process:
            spent = int(time.perf_counter() - started)
            print(f"[{spent // 60:02d}:{spent % 60:02d}] {text}", flush=True)

    return Session(accelerator, out, say)


def close_session(session: Session) -> None:
    """Leave the group of processes, if there is one; a session that is not closed makes torch complain at the end."""
    if session.accelerator.num_processes > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclasses.dataclass
class Data:
    """Images to learn from and to test on, with their classes and text features.

    Attributes:
        title: the categories' or the file's name.
        train, test: data sets of ``{img, cls, bboxes}``; they share no image.
        classes: class names in the order of the labels.
        features: text features of the classes and of the generated defects.
        source: a sentence on where the data come from.
    """

    title: str
    train: DetectionImages
    test: DetectionImages
    classes: tuple[str, ...]
    features: TextFeatures
    source: str

    @property
    def texts(self) -> Tensor:
        """The classes' text features, ``(1, number of classes, 512)``."""
        return self.features.of(self.classes)


def load_data(args: argparse.Namespace, say: Callable[[str], None] | None = None) -> Data:
    """Return the data that the options ask for; several categories are learned together, over all their classes.

    Raises:
        DataError: if the data cannot be read.
        TextError: if the class texts cannot be read, or a class has no text features.
    """
    generated = args.data is None
    path = generated_data(demo_options(args)) if generated else args.data
    splits = open_dataset(
        path, size=args.image_size, split=args.split, seed=args.data_seed, train_share=args.train_share,
        min_area=args.min_area, classes=None if args.classes is None else load_class_texts(args.classes),
        categories=args.categories or (ADAPTER_CATEGORIES[:1] if generated else ()), images=args.image_folder,
        drop_others=args.drop_others, augmentation=augmentation_of(args) if hasattr(args, "augment") else None,
    )  # fmt: skip
    others = sorted(DEFECTS) if args.weights is None else ()
    features = load_class_features(splits.texts, args.texts, clip=args.clip, others=others)
    source = f"GENERATED, not photographs: {path}" if generated else f"{path} ({splits.form})"
    data = Data(splits.title, splits.train, splits.test, splits.classes, features, source)
    if say is not None:
        say(f"data: {source}; {data.title}: {len(data.train)} images train, {len(data.test)} others test; "
            f"classes {', '.join(data.classes)}; text features {features.source}")  # fmt: skip
        for note in splits.notes:
            say(f"  {note}")
    return data


def demo_options(args: argparse.Namespace) -> Options:
    """Return the options the demo would make base and generated data with, so that both share one cache."""
    return Options(
        data=getattr(args, "data", None),
        categories=ADAPTER_CATEGORIES if set(args.categories) <= set(ADAPTER_CATEGORIES) else args.categories,
        base_categories=BASE_CATEGORIES, weights=args.weights, texts=args.texts, spec=SPEC, out=Path(), cache=args.cache,
        scale=args.scale, seed=args.data_seed, quick=False, device=args.device, precision="no", threads=args.threads,
        image_size=args.image_size, images=args.images, train_share=args.train_share, min_area=args.min_area,
        batch_size=DEMO_DEFAULTS["batch_size"], accumulation=1, base_steps=args.base_steps, steps=1,
        base_lr=2e-3, adapter_lr=4e-3, full_lr=1e-3, weight_decay=0.05, evaluations=1,
    )  # fmt: skip


def load_base(args: argparse.Namespace, features: TextFeatures, session: Session) -> Base:
    """Return the frozen base: from ``--weights``, else from the cache, else trained now and put into the cache.

    Raises:
        WeightsError: if the weights cannot be read, or the base cannot be trained.
    """
    options = demo_options(args)
    if session.accelerator.num_processes > 1:
        if session.accelerator.is_local_main_process and not is_cached(options, features):
            session.say("there is no base for these options in the cache: one process trains it, the others wait")
            fill_cache(options, features)
        session.accelerator.wait_for_everyone()
    log_folder = (session.out or args.cache) / "tensorboard_base"
    writer = None if is_cached(options, features) else SummaryWriter(log_folder)
    base = get_base(options, features, session.accelerator, writer, session.say)
    if writer is not None:
        writer.close()
    session.say(f"base: {base.source}")
    return base


def load_spec(path: Path, aliases: Path | None = None) -> convpeft.Spec:
    """Return a spec file with its named positions: the spec's own, and ultralytics' names for the others.

    Args:
        path: spec file.
        aliases: file of named positions that wins over both.
    """
    if aliases is not None or not ALIASES.is_file() or not path.is_file():
        return convpeft.Spec.load(path, aliases=aliases)
    named = yaml.safe_load(ALIASES.read_text(encoding="utf-8"))
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    own_names = (own.get("aliases") or {}) if isinstance(own, dict) else {}
    named = {name: value for name, value in named.get("aliases", named).items() if name not in own_names}
    return convpeft.Spec.load(path, aliases=named)


def load_adapters(model: nn.Module, files: Sequence[Path]) -> list[str]:
    """Put adapter files into the model in place, each under its own name or its file's where that is taken; return the names.

    The last one is the active one.
    """
    names: list[str] = []
    for path in files:
        name = convpeft.inspect_adapter(path).name
        name = name if name not in names else path.stem.replace(".", "_")
        convpeft.load_adapter(model, path, name=name)
        names.append(name)
    return names


def run_command(command: Callable[[], Any]) -> int:
    """Run a command's body and return the exit status: 0, or 2 with the error in one line on standard error."""
    try:
        command()
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
