"""What every command runs with: its device and processes, and the data, base, spec and adapters its options ask for.

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
from ..data.datasets import open_dataset
from ..data.generate import DEFECTS, cached
from ..data.images import DataError, DetectionImages
from ..data.texts import TextError, TextFeatures, class_texts, load_class_features, load_class_texts
from ..training.base import ADAPTER_CATEGORIES, Base, Recipe, fill_cache, given_base, read_base, train_base
from ..training.checkpoint import CheckpointError
from ..training.model import WeightsError, prepare_ultralytics
from ..training.parallel import ParallelError, make_accelerator
from .options import ALIASES


class CommandError(ValueError):
    """Options that do not go together here: says which, why, and what to do."""


ERRORS = (
    DataError, TextError, WeightsError, CheckpointError, CommandError, ParallelError, convpeft.ConvPeftError,
    FloatingPointError,
)  # fmt: skip
"""What a command reports as ``error: <text>`` with status 2; anything else is a defect and shows its traceback."""


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
    accelerator = make_accelerator(args.device, args.precision)
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
    categories = args.categories or (ADAPTER_CATEGORIES[:1] if generated else ())
    path = cached(args.cache, categories, images=args.images, seed=args.data_seed) if generated else args.data
    splits = open_dataset(
        path, size=args.image_size, split=args.split, seed=args.data_seed, train_share=args.train_share,
        min_area=args.min_area, classes=None if args.classes is None else load_class_texts(args.classes),
        categories=categories, images=args.image_folder,
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


def ask_classes(args: argparse.Namespace, session: Session) -> tuple[tuple[str, ...], TextFeatures]:
    """Return the classes to look for and their text features: of --names, --classes, --data, or the generated defects.

    Raises:
        CommandError: if --names and --classes are both given, or neither is and the weights are the user's own.
        TextError: if the list is wrong, or a text has no features.
    """
    if args.names and args.classes is not None:
        raise CommandError("--names and --classes both say which classes to look for; give one of them.")
    if args.names:
        classes = class_texts(list(args.names), "--names")
    elif args.classes is not None:
        classes = load_class_texts(args.classes)
    elif args.data is not None:
        data = load_data(args, session.say)
        return data.classes, data.features
    elif args.weights is None:
        classes = class_texts(sorted(DEFECTS))
    else:
        raise CommandError("which classes? Give --names scratch dent, or --classes with a JSON list, or their --data.")
    features = load_class_features(classes, args.texts, clip=getattr(args, "clip", None), others=sorted(DEFECTS))
    session.say(f"classes {', '.join(classes.names)}; text features {features.source}")
    return classes.names, features


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return which base the options ask for; the demo's default is the same, so that all share one in the cache."""
    return Recipe(
        args.scale, args.data_seed, images=args.images, image_size=args.image_size, min_area=args.min_area,
        train_share=args.train_share, steps=args.base_steps,
    )  # fmt: skip


def load_base(args: argparse.Namespace, features: TextFeatures, session: Session, recipe: Recipe | None = None) -> Base:
    """Return the frozen base: from ``--weights``, else from the cache, else trained now and put into the cache.

    Args:
        args: options of the command.
        features: with those of the generated defects among them.
        session: device, processes and voice.
        recipe: instead of what the options ask for.

    Raises:
        WeightsError: if the weights cannot be read, or the base cannot be trained.
    """
    accelerator = session.accelerator
    if args.weights is not None:
        base = given_base(args.weights, accelerator.device)
    else:
        recipe = recipe or recipe_of(args)
        if accelerator.num_processes > 1:
            if accelerator.is_local_main_process and not recipe.file(args.cache, features).is_file():
                session.say("there is no base for these options in the cache: one process trains it, the others wait")
                fill_cache(recipe, args.cache, features, args.device)
            accelerator.wait_for_everyone()
        base = read_base(recipe, args.cache, features, accelerator.device)
        if base is None:
            with SummaryWriter((session.out or args.cache) / "tensorboard" / "base") as writer:
                base = train_base(recipe, args.cache, features, accelerator, writer=writer, say=session.say)
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


def run_command(args: argparse.Namespace, execute: Callable[[argparse.Namespace], Any]) -> int:
    """Run a command with its options and return the exit status: 0, or 2 with the error in one line on standard error."""
    try:
        execute(args)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
