"""The one training loop: resumable at any step, guarded, averaged, and the same over several processes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..data.images import Batch
from .checkpoint import copy_into, load_checkpoint, save_checkpoint
from .ema import MovingAverage
from .guard import Guard, GuardSettings
from .parallel import (
    BatchLoss,
    clip_gradients,
    full,
    mean_of_whole_gradients,
    mean_over_processes,
    put,
    sharded_like,
    unsynchronised,
    wrap,
)
from .schedule import FLOOR, WARM_UP, rate_factor
from .scores import Scores
from .stream import Positions, batches, seed_of

CLIP_NORM = 10.0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How one training runs.

    Args:
        steps: optimizer steps in all.
        batch_size: images per forward pass of one process.
        accumulation: forward passes per step.
        clip: largest norm of the gradients; 0 leaves them.
        ema: decay of the moving average that is evaluated and saved; 0 for none.
        evaluations: how often the scores are taken, evenly over the steps.
        patience: stop after so many evaluations without a better mAP50-95; 0 never stops.
        checkpoint_every: steps between two checkpoints; there is one at each evaluation as well.
        warm_up, floor: of the schedule, as shares of the steps and of the rate.
        seed: of order, augmentation and dropout.
        workers: processes that load images ahead, for each training process.
        parallel: ``ddp`` or ``fsdp``, for more than one process.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    clip: float = CLIP_NORM
    ema: float = 0.0
    evaluations: int = 10
    patience: int = 0
    checkpoint_every: int = 100
    warm_up: float = WARM_UP
    floor: float = FLOOR
    seed: int = 0
    workers: int = 0
    parallel: str = "ddp"


@dataclasses.dataclass
class Curves:
    """What a training has to show so far, one entry per step where not said otherwise.

    Attributes:
        losses, norms, factors: loss, gradient norm before clipping, and what the rates were multiplied by.
        scores: (steps done, scores) of each evaluation.
        messages: what the guard said.
        best, best_step: highest mAP50-95, and after how many steps.
        waited: evaluations since then.
        seconds: time in steps, over all runs.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    factors: list[float] = dataclasses.field(default_factory=list)
    scores: list[tuple[int, Scores]] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)
    best: float = -1.0
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return everything of a model that a training may change, by name: trainable parameters, and buffers."""
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not isinstance(tensor, nn.Parameter) or tensor.requires_grad
    }


class Trainer:
    """One training of the parameters in ``groups``, from step ``self.step`` on.

    Everything random is a function of seed and step, so a run that begins at a step goes on as one that got there.

    Args:
        model: detector, injected (and sharded, for ``fsdp``), on its device.
        groups: optimizer groups; each group's ``lr`` is its base rate.
        data: training images by index.
        texts: features of the classes, ``(1, number of classes, 512)``.
        settings: see there.
        guard: see there.
        accelerator: device, precision and processes.
        measure: called by every process on the model to take scores; only the main process's count.
        keep: called by every process as ``keep("last" | "best")`` to write the adapter as the model shows it.
        extra_loss: added to the loss, such as ``convpeft.auxiliary_loss``.
        writer: TensorBoard, in the main process.
        say: prints a line, from the main process.
        note: plain data that goes into the checkpoints.
        title: name in the progress bar, and before the names of the scalars in TensorBoard.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        data: Any,
        texts: Tensor,
        settings: TrainSettings,
        *,
        accelerator: Accelerator,
        guard: GuardSettings | None = None,
        measure: Callable[[nn.Module], Scores | None] | None = None,
        keep: Callable[[str], None] | None = None,
        extra_loss: Callable[[nn.Module], Tensor] | None = None,
        writer: SummaryWriter | None = None,
        say: Callable[[str], None] = print,
        note: dict[str, Any] | None = None,
        title: str = "",
    ) -> None:
        self.model, self.data, self.texts, self.settings, self.accelerator = model, data, texts, settings, accelerator
        self.measure, self.keep, self.writer, self.say, self.note, self.title = (
            measure,
            keep,
            writer,
            say,
            note or {},
            title,
        )
        self.base_rates = [group["lr"] for group in groups]
        self.names = [group.get("name", str(number)) for number, group in enumerate(groups)]
        self.optimizer = torch.optim.AdamW(groups)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.tensors = moving_tensors(model)
        self.guard = Guard(guard or GuardSettings(), self.tensors, self.optimizer)
        self.average = MovingAverage(self.tensors, settings.ema) if settings.ema else None
        model.criterion = None
        model.train()
        self.statistics = [
            buffer for module in model.modules() if module.training for buffer in module.buffers(recurse=False)
        ]
        self.loss = BatchLoss(model, accelerator.num_processes, extra_loss)
        self.wrapped = wrap(self.loss, settings.parallel, accelerator.device)
        self.step, self.curves, self.stopped = 0, Curves(), False

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    def run(self, checkpoint: Path | None = None, *, until: int | None = None) -> Curves:
        """Train to the end of the schedule, in place, and return the curves.

        Args:
            checkpoint: file the state is written to, atomically, as often as the settings say and at the end.
            until: stop before this step, as if interrupted, without a last evaluation.
        """
        settings, end = self.settings, self.settings.steps if until is None else min(until, self.settings.steps)
        pauses = {round(settings.steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
        rows = self.batches(end)
        bar = tqdm(
            total=settings.steps,
            initial=self.step,
            desc=self.title or "train",
            unit="step",
            mininterval=2.0,
            disable=not self.is_main,
        )
        while self.step < end and not self.stopped:
            self.take_step(rows)
            bar.update()
            bar.set_postfix_str(f"loss {self.curves.losses[-1]:.4g}", refresh=False)
            if self.step in pauses:
                self.evaluate()
            if checkpoint is not None and (self.step in pauses or self.step % settings.checkpoint_every == 0):
                self.save(checkpoint)
        bar.close()
        self.model.criterion = None
        return self.curves

    def batches(self, end: int) -> Iterator[Batch]:
        """Return this process's batches from the present step to before step ``end``."""
        settings, accelerator = self.settings, self.accelerator
        positions = Positions(
            self.step * settings.accumulation, end * settings.accumulation, settings.batch_size,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        return batches(self.data, self.texts, settings.seed, positions, workers=settings.workers)

    def take_step(self, rows: Iterator[Batch]) -> None:
        """Do one step: forward and backward over the accumulated batches, then the update, unless the guard objects."""
        settings, started = self.settings, time.perf_counter()
        factor = (
            rate_factor(self.step, settings.steps, warm_up=settings.warm_up, floor=settings.floor) * self.guard.rate
        )
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        torch.manual_seed(seed_of("step", settings.seed, self.step, self.accelerator.process_index))
        self.optimizer.zero_grad()
        before = [buffer.clone() for buffer in self.statistics]
        loss = self.backward(rows)
        norm = self.gradient_norm()
        loss, norm = mean_over_processes(torch.tensor([loss, norm], dtype=torch.float64)).tolist()
        scaler = self.accelerator.scaler
        reason = self.guard.fault(loss, norm)
        if reason is None:
            self.guard.passed(self.step, loss)
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
            if scaler is not None:
                scaler.update()
            if self.average is not None:
                self.average.update()
        else:
            for buffer, value in zip(self.statistics, before, strict=True):
                buffer.copy_(value)  # what BatchNorm saw in a bad step is forgotten, too
            self.object(reason, loss)
        self.step += 1
        self.curves.seconds += time.perf_counter() - started
        self.curves.losses.append(loss)
        self.curves.norms.append(norm)
        self.curves.factors.append(factor)
        self.log(
            {"loss": loss, "gradient norm": norm, "guard/skipped": self.guard.skipped, "guard/rate": self.guard.rate}
        )
        self.log({f"rate/{name}": rate * factor for name, rate in zip(self.names, self.base_rates, strict=True)})

    def object(self, reason: str, loss: float) -> None:
        """Leave out the update of a bad step, and have the guard act on it.

        In fp16 the loss is scaled up, and gradients that overflow by that only tell that the scale was too high: the step is
        left out and the scale halved, but that is no reason to go back.
        """
        scaler = self.accelerator.scaler
        if scaler is not None:
            scale = scaler.get_scale()
            scaler.update(scale / 2)
            if scale > 1 and loss == loss and abs(loss) != float("inf"):
                return
        self.optimizer.zero_grad()
        message = self.guard.failed(self.step, reason)
        self.curves.messages.append(message)
        self.say(f"guard: {message}")

    def backward(self, rows: Iterator[Batch]) -> float:
        """Run the accumulated batches forward and backward and return their mean loss in this process."""
        count, device, scaler = self.settings.accumulation, self.accelerator.device, self.accelerator.scaler
        total = 0.0
        for number in range(count):
            batch = {key: value.to(device, non_blocking=True) for key, value in next(rows).items()}
            with unsynchronised(self.wrapped, number == count - 1):
                with self.accelerator.autocast():
                    loss = self.wrapped(batch) / count
                (loss if scaler is None else scaler.scale(loss)).backward()
            total += float(loss.detach())
        return total

    def gradient_norm(self) -> float:
        """Clip the gradients, in place, and return the norm they had."""
        mean_of_whole_gradients(self.parameters)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        return clip_gradients(self.parameters, self.settings.clip or float("inf"))

    def evaluate(self) -> None:
        """Take the scores of what will be saved, write it, and decide whether to go on."""
        if self.measure is None:
            return
        with self.average.shown() if self.average is not None else nullcontext():
            holder = [self.measure(self.model)]
            if self.accelerator.num_processes > 1:
                torch.distributed.broadcast_object_list(holder)
            scores = holder[0]
            assert scores is not None
            better = scores.map50_95 > self.curves.best
            if self.keep is not None:
                self.keep("last")
                if better:
                    self.keep("best")
        self.model.train()
        curves = self.curves
        curves.scores.append((self.step, scores))
        curves.waited = 0 if better else curves.waited + 1
        if better:
            curves.best, curves.best_step = scores.map50_95, self.step
        self.log({"map50": scores.map50, "map50_95": scores.map50_95})
        self.say(
            f"step {self.step}: mAP50 {scores.map50:.3f}, mAP50-95 {scores.map50_95:.3f}{' (best)' if better else ''}"
        )
        if self.settings.patience and curves.waited >= self.settings.patience:
            self.stopped = True
            self.say(f"stopped early: no better mAP50-95 in {curves.waited} evaluations (--patience)")

    def log(self, values: dict[str, float]) -> None:
        """Write scalars to TensorBoard, if there is a writer."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{self.title}/{name}" if self.title else name, value, self.step)

    def state(self) -> dict[str, Any]:
        """Return everything that a run needs to go on from here, live tensors included."""
        scaler = self.accelerator.scaler
        curves = {
            **vars(self.curves),
            "scores": [[step, dataclasses.asdict(found)] for step, found in self.curves.scores],
        }
        return {
            "step": self.step, "stopped": self.stopped, "curves": curves, "note": self.note,
            "settings": dataclasses.asdict(self.settings), "tensors": self.tensors,
            "optimizer": self.optimizer.state_dict(), "guard": self.guard.state(),
            "average": None if self.average is None else {"updates": self.average.updates, "averages": self.average.averages},
            "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the state to a file, atomically; all processes take part."""
        save_checkpoint(path, self.state(), full=full, write=self.is_main)

    def resume(self, path: Path) -> None:
        """Take over the state of a checkpoint, in place.

        Raises:
            CheckpointError: if the file cannot be read, or is of another adapter; nothing is changed then.
        """
        state = load_checkpoint(path)
        copy_into(self.tensors, state["tensors"], put, str(path))
        self.optimizer.load_state_dict(self.placed(state["optimizer"]))
        self.guard.load(self.guard_placed(state["guard"]))
        if self.average is not None and state["average"] is not None:
            self.average.updates = state["average"]["updates"]
            copy_into(self.average.averages, state["average"]["averages"], put, str(path))
        elif self.average is not None:
            self.average.write(self.tensors)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        scores = [(step, Scores(**found)) for step, found in state["curves"].pop("scores")]
        self.curves = Curves(**state["curves"], scores=scores)
        self.step, self.stopped = state["step"], False

    def placed(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's whole state sharded as the parameters are."""
        targets = dict(enumerate(self.parameters))
        states = {
            number: {
                name: sharded_like(value, targets[number]) if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
            for number, entry in optimizer["state"].items()
        }
        return {**optimizer, "state": states}

    def guard_placed(self, guard: dict[str, Any]) -> dict[str, Any]:
        """Return a guard's whole state on the device, sharded as the live tensors are."""
        placed = dict(guard)
        for which in ("first", "last"):
            if guard[which] is not None:
                tensors = {
                    name: sharded_like(value.to(self.tensors[name].device), self.tensors[name].detach())
                    for name, value in guard[which]["tensors"].items()
                }
                placed[which] = {
                    **guard[which],
                    "tensors": tensors,
                    "optimizer": self.placed(guard[which]["optimizer"]),
                }
        return placed
