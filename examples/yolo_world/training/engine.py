"""A plain PyTorch training loop on accelerate, for the base, the adapters and full fine-tuning alike."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.mvtec import Batch, Collate, DefectImages
from .schedule import rate_factor
from .scores import Scores

CLIP_NORM = 10.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one training runs.

    Args:
        steps: optimizer steps.
        batch_size: images per forward pass.
        accumulation: forward passes per optimizer step.
        evaluations: how often the scores are taken, evenly over the steps; they steer nothing.
        seed: of the order of the images and of the augmentation.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    evaluations: int = 4
    seed: int = 0


@dataclasses.dataclass
class History:
    """What a training left behind: loss and rate of each step, scores by step, and the time of a step."""

    losses: list[float] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, Scores]] = dataclasses.field(default_factory=list)
    seconds_per_step: float = 0.0


def all_parameter_groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups of all trainable parameters; vectors and scalars (norms, biases) have no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]


def make_accelerator(device: str, precision: str, accumulation: int) -> Accelerator:
    """Return the accelerator that all trainings of a run share.

    Args:
        device: ``cpu``, or ``auto`` for what accelerate finds.
        precision: ``no``, ``bf16`` or ``fp16``.
        accumulation: forward passes per optimizer step.

    Raises:
        RuntimeError: if several processes were launched and accelerate does not join them: each would train alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.cuda.is_available():
        device = "cpu"  # accelerate joins processes on the CPU only if it is told to use it
    waiting = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # others wait while the first one evaluates
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[waiting],
    )
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes} on {accelerator.device}"
        )
    return accelerator


def endless(loader: DataLoader[Any]) -> Iterator[Batch]:
    """Yield the loader's batches for ever."""
    while True:
        yield from loader


def make_loader(data: DefectImages, texts: Tensor, settings: Settings) -> DataLoader[Any]:
    """Return a loader of full, shuffled batches; small data sets give smaller batches rather than none."""
    size = min(settings.batch_size, len(data))
    order = torch.Generator().manual_seed(settings.seed)
    return DataLoader(data, size, shuffle=True, drop_last=True, collate_fn=Collate(texts), generator=order)


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    data: DefectImages,
    texts: Tensor,
    settings: Settings,
    accelerator: Accelerator,
    *,
    title: str,
    writer: SummaryWriter | None = None,
    measure: Callable[[nn.Module], Scores] | None = None,
    extra_loss: Callable[[nn.Module], Tensor] | None = None,
) -> History:
    """Train the parameters in ``groups``, in place, and return the curves.

    AdamW, warm-up and cosine (``rate_factor``), gradients clipped at norm 10. The loss is the model's own, per image.

    Args:
        model: detector whose ``model(batch)`` returns its losses, as ultralytics' do.
        groups: optimizer groups; each group's ``lr`` is its base rate.
        data: training images.
        texts: features of the classes, ``(1, number of classes, 512)``.
        settings: steps, batches and seed.
        accelerator: device, precision and accumulation.
        title: name in the progress bar and in TensorBoard.
        writer: TensorBoard scalars go here.
        measure: called on the model ``settings.evaluations`` times to record scores.
        extra_loss: added to the loss, e.g. ``convpeft.auxiliary_loss``.
    """
    torch.manual_seed(settings.seed)
    model.criterion = None
    base_rates = [group["lr"] for group in groups]
    loader = make_loader(data, texts, settings)
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(groups), loader)
    batches, history = endless(loader), History()
    pauses = pauses_for_scores(settings) if measure else set()
    model.train()
    for step in tqdm(range(settings.steps), desc=title, unit="step", mininterval=2.0):
        factor = rate_factor(step, settings.steps)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        started = time.perf_counter()
        loss = optimizer_step(wrapped, model, optimizer, batches, settings, accelerator, extra_loss)
        history.seconds_per_step += (time.perf_counter() - started) / settings.steps
        history.losses.append(loss)
        history.rates.append(base_rates[0] * factor)
        log(writer, title, step, {"loss": loss, "rate": base_rates[0] * factor})
        if measure is not None and step + 1 in pauses:
            scores = measure(model)
            model.train()
            history.scores.append((step + 1, scores))
            log(writer, title, step, {"map50": scores.map50, "map50_95": scores.map50_95})
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    model.criterion = None
    return history


def pauses_for_scores(settings: Settings) -> set[int]:
    """Return the numbers of steps after which the scores are taken; the last step is always one."""
    return {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}


def optimizer_step(
    wrapped: nn.Module,
    model: nn.Module,
    optimizer: Any,
    batches: Iterator[Batch],
    settings: Settings,
    accelerator: Accelerator,
    extra_loss: Callable[[nn.Module], Tensor] | None,
) -> float:
    """Take one optimizer step over ``settings.accumulation`` batches and return the mean loss per image."""
    total = 0.0
    for _ in range(settings.accumulation):
        batch = next(batches)
        with accelerator.accumulate(wrapped), accelerator.autocast():
            losses, _ = wrapped(batch)
            loss = losses.sum() / len(batch["img"])
            if extra_loss is not None:
                loss = loss + extra_loss(model)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise FloatingPointError("the loss is not finite; lower the learning rate (--lr, --adapter-lr, --full-lr).")
    return total / settings.accumulation


def log(writer: SummaryWriter | None, title: str, step: int, values: dict[str, float]) -> None:
    """Write scalars to TensorBoard, if there is a writer."""
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(f"{title}/{name}", value, step)
