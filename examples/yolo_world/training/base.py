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

from ..data.augment import flip_and_relight
from ..data.datasets import Splits, open_dataset
from ..data.generate import DEFECTS, cached, drawing_version
from ..data.texts import TextFeatures
from .guard import GIVE_UP
from .model import (
    WeightsError,
    all_parameter_groups,
    build_world_model,
    load_world_model,
    prepare_ultralytics,
    use_classes,
)
from .parallel import make_accelerator
from .scores import Scores, evaluate
from .trainer import Trainer, TrainSettings

BASE_CATEGORIES = ("metal", "fabric", "wood", "leather", "stone")
ADAPTER_CATEGORIES = ("tile", "washer")
TRAINING = 2
"""Number of the way a base is trained; one trained in another way is not taken from the cache."""

LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "OMP_NUM_THREADS")  # fmt: skip
"""What launchers set, by how the names begin."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model, a sentence on where it comes from, and its scores on its own categories (None for --weights)."""

    model: nn.Module
    source: str
    own: Scores | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides which small detector is trained where no weights are given.

    Args:
        scale: of the model, ``n``, ``s`` or ``l``.
        seed: of data, split, weights, order and augmentation.
        categories: generated categories it learns.
        images: generated per category and defect.
        image_size, min_area, train_share: see ``open_dataset``.
        batch_size, accumulation, steps, lr, weight_decay: of its training.
        precision: ``no``, ``bf16`` or ``fp16``.
    """

    scale: str = "n"
    seed: int = 0
    categories: tuple[str, ...] = BASE_CATEGORIES
    images: int = 30
    image_size: int = 192
    min_area: int = 25
    train_share: float = 0.6
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 350
    lr: float = 2e-3
    weight_decay: float = 0.05
    precision: str = "no"

    def file(self, cache: Path, texts: TextFeatures) -> Path:
        """Return where the base of this recipe is kept, whether it is there or not; the name depends on all it depends on."""
        features = {name: hashlib.sha256(texts.table[name].numpy().tobytes()).hexdigest() for name in sorted(DEFECTS)}
        asked = [dataclasses.asdict(self), TRAINING, torch.__version__, drawing_version(), features]
        return cache / f"base-{self.scale}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}.pt"

    def data(self, cache: Path) -> Splits:
        """Return the images it learns from and is tested on, over all its categories; they are drawn if need be."""
        return open_dataset(
            cached(cache, self.categories, images=self.images, seed=self.seed),
            size=self.image_size, seed=self.seed, train_share=self.train_share, min_area=self.min_area,
            categories=self.categories, augmentation=flip_and_relight,
        )  # fmt: skip


def fill_cache(recipe: Recipe, cache: Path, texts: TextFeatures, device: str) -> None:
    """Train the base and put it into the cache, in a process of its own that belongs to no group of processes.

    Raises:
        WeightsError: if that process fails; what went wrong is on the screen.
    """
    launched = {name: value for name, value in os.environ.items() if name.startswith(LAUNCHED)}
    for name in launched:
        del os.environ[name]
    try:
        alone = multiprocessing.get_context("spawn").Process(target=_fill_cache, args=(recipe, cache, texts, device))
        alone.start()
    finally:
        os.environ.update(launched)
    alone.join()
    if alone.exitcode:
        raise WeightsError("the base could not be trained; see above. Run the same command in one process.")


def _fill_cache(recipe: Recipe, cache: Path, texts: TextFeatures, device: str) -> None:
    prepare_ultralytics()
    train_base(recipe, cache, texts, make_accelerator(device, recipe.precision))


def train_base(
    recipe: Recipe, cache: Path, texts: TextFeatures, accelerator: Accelerator, *,
    writer: SummaryWriter | None = None, say: Callable[[str], None] = print,
) -> Base:  # fmt: skip
    """Train the base of a recipe from random weights, put it into the cache, and return it.

    Args:
        recipe: see there.
        cache: folder of the base and of its data.
        texts: features of the generated defects.
        accelerator: device and precision.
        writer: TensorBoard.
        say: prints a line.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    say(f"data for the base: generated, {', '.join(recipe.categories)}, seed {recipe.seed}")
    data, own_texts = recipe.data(cache), texts.of(sorted(DEFECTS))
    model = build_world_model(recipe.scale, class_count=len(DEFECTS), seed=recipe.seed).to(accelerator.device)
    size = min(recipe.batch_size, len(data.train))
    Trainer(
        model, all_parameter_groups(model, lr=recipe.lr, weight_decay=recipe.weight_decay), data.train, own_texts,
        TrainSettings(recipe.steps, size, recipe.accumulation, seed=recipe.seed), accelerator=accelerator,
        guard=GIVE_UP, writer=writer, say=say, title="base",
    ).run()  # fmt: skip
    own, stored = evaluate(model, data.test, own_texts, batch_size=recipe.batch_size), recipe.file(cache, texts)
    unfinished = stored.with_suffix(".part")
    torch.save({"model": model.state_dict(), "own": dataclasses.asdict(own)}, unfinished)
    unfinished.replace(stored)
    return Base(model, f"trained just now on {len(data.train)} generated images, kept as {stored.name}", own)


def read_base(recipe: Recipe, cache: Path, texts: TextFeatures, device: torch.device) -> Base | None:
    """Return the base of a recipe from the cache, or None if it is not there."""
    stored = recipe.file(cache, texts)
    if not stored.is_file():
        return None
    content = torch.load(stored, map_location="cpu", weights_only=True)
    model = build_world_model(recipe.scale, class_count=len(DEFECTS), seed=recipe.seed)
    model.load_state_dict(content["model"])
    use_classes(model, texts.of(sorted(DEFECTS)))
    source = (
        f"trained on generated data in an earlier run, read from the cache ({stored.name}); delete it to train anew"
    )
    return Base(model.to(device), source, Scores(**content["own"]))


def given_base(weights: Path, device: torch.device) -> Base:
    """Return the base of the user's own weights file.

    Raises:
        WeightsError: if it cannot be read.
    """
    return Base(load_world_model(weights).to(device), f"weights {weights.name}", None)
