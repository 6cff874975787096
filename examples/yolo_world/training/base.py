"""The frozen base: the user's weights, or a small detector trained on other generated categories and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ..commands.settings import Options
from ..data.generate import DEFECTS, drawing_version, generate
from ..data.mvtec import DefectImages, read_category
from ..data.texts import TextFeatures
from .engine import Settings, all_parameter_groups, make_accelerator, train
from .model import WeightsError, build_world_model, load_world_model, prepare_ultralytics, use_classes
from .scores import Scores, evaluate

LAUNCHED = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "OMP_NUM_THREADS",
)
"""What launchers set, by how the names begin."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model, a sentence on where it comes from, and its scores on its own categories (None for --weights)."""

    model: nn.Module
    source: str
    own: Scores | None


def generated_data(options: Options) -> Path:
    """Write the generated data set into the cache, unless it is there already, and return its folder."""
    needed = (*options.base_categories, *([] if options.data else options.categories))
    description = json.dumps([needed, options.images, options.seed, drawing_version()])
    folder = options.cache / f"generated-{hashlib.sha256(description.encode()).hexdigest()[:12]}"
    return generate(folder, needed, images=options.images, good=max(2, min(options.images // 4, 8)), seed=options.seed)


def base_key(options: Options, texts: TextFeatures) -> str:
    """Return a short digest of all that the trained base depends on."""
    features = {name: hashlib.sha256(texts.table[name].numpy().tobytes()).hexdigest() for name in sorted(DEFECTS)}
    asked = [options.scale, options.seed, options.base_categories, options.images, options.image_size, options.min_area]
    asked += [options.batch_size, options.accumulation, options.base_steps, options.base_lr, options.weight_decay]
    asked += [options.train_share, options.precision, torch.__version__, drawing_version(), features]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def base_data(options: Options, say: Callable[[str], None]) -> tuple[DefectImages, DefectImages]:
    """Return the base's training and test images, over all its categories."""
    say(f"data for the base: generated, {', '.join(options.base_categories)}, seed {options.seed}")
    root = generated_data(options)
    read = [
        read_category(root, name, train_share=options.train_share, seed=options.seed)
        for name in options.base_categories
    ]
    sides = ([s for category in read for s in category.train], [s for category in read for s in category.test])
    size, area, classes = options.image_size, options.min_area, sorted(DEFECTS)
    return (
        DefectImages(sides[0], classes, size=size, min_area=area, augmented=True),
        DefectImages(sides[1], classes, size=size, min_area=area, augmented=False),
    )


def cached_base(options: Options, texts: TextFeatures) -> Path:
    """Return the file in which the base of these options is kept, whether it is there or not."""
    return options.cache / f"base-{options.scale}-{base_key(options, texts)}.pt"


def is_cached(options: Options, texts: TextFeatures) -> bool:
    """Return whether ``get_base`` would only have to read a file."""
    return options.weights is not None or cached_base(options, texts).is_file()


def fill_cache(options: Options, texts: TextFeatures) -> None:
    """Train the base and put it into the cache, in a process of its own that belongs to no group of processes.

    Raises:
        WeightsError: if that process fails; what went wrong is on the screen.
    """
    launched = {name: value for name, value in os.environ.items() if name.startswith(LAUNCHED)}
    for name in launched:
        del os.environ[name]
    try:
        alone = multiprocessing.get_context("spawn").Process(target=_fill_cache, args=(options, texts))
        alone.start()
    finally:
        os.environ.update(launched)
    alone.join()
    if alone.exitcode:
        raise WeightsError("the base could not be trained; see above. Run the same command in one process.")


def _fill_cache(options: Options, texts: TextFeatures) -> None:
    prepare_ultralytics()
    get_base(options, texts, make_accelerator(options.device, options.precision, options.accumulation), None, print)


def get_base(
    options: Options,
    texts: TextFeatures,
    accelerator: Accelerator,
    writer: SummaryWriter | None,
    say: Callable[[str], None],
) -> Base:
    """Return the base: from ``--weights``, else from the cache, else trained now and put into the cache."""
    if options.weights is not None:
        model = load_world_model(options.weights).to(accelerator.device)
        return Base(model, f"weights {options.weights.name}", None)
    stored = cached_base(options, texts)
    model = build_world_model(options.scale, class_count=len(DEFECTS), seed=options.seed)
    own_texts = texts.of(sorted(DEFECTS))
    if stored.is_file():
        content = torch.load(stored, map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
        source = (
            f"trained on generated data in an earlier run, read from the cache ({stored.name}); delete it to train anew"
        )
        return Base(use_classes(model, own_texts).to(accelerator.device), source, Scores(**content["own"]))
    train_data, test_data = base_data(options, say)
    settings = Settings(options.base_steps, options.batch_size, options.accumulation, seed=options.seed)
    groups = all_parameter_groups(model, lr=options.base_lr, weight_decay=options.weight_decay)
    train(model, groups, train_data, own_texts, settings, accelerator, title="base", writer=writer)
    own = evaluate(model, test_data, own_texts, batch_size=options.batch_size)
    stored.parent.mkdir(parents=True, exist_ok=True)
    unfinished = stored.with_suffix(".part")
    torch.save({"model": model.state_dict(), "own": dataclasses.asdict(own)}, unfinished)
    unfinished.replace(stored)
    return Base(model, f"trained just now on {len(train_data)} generated images, kept as {stored.name}", own)
