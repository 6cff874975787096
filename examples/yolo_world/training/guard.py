"""A guard over a training: skip steps that are not finite, and return to the last good adapter after a streak of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RECENT = 50
ENOUGH = 10
CALM = 2.0


@dataclasses.dataclass(frozen=True)
class GuardSettings:
    """When the guard acts.

    Args:
        streak: so many bad steps in a row make it return to the last good state.
        lower: the learning rate is multiplied by this at each return.
        every: good steps between two snapshots.
        spike: a finite loss above so many times the median of the last 50 good ones is bad too; 0 turns that off.
        most_returns: with one more, training is given up.
    """

    streak: int = 3
    lower: float = 0.3
    every: int = 20
    spike: float = 20.0
    most_returns: int = 20


GIVE_UP = GuardSettings(streak=1, spike=0, most_returns=0)
"""Ends a training at its first step that is not finite."""


@dataclasses.dataclass
class Snapshot:
    """What trains, and the optimizer's state, as they were before a step whose loss and gradients were finite."""

    step: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]


class Guard:
    """Judges each step, counts the bad ones, and returns to a snapshot after a streak of them.

    A snapshot is taken *before* an update whose loss and gradients were finite, so it is known to be good; one whose
    loss is over twice the recent median is not taken. If the run breaks again before another snapshot could be taken,
    the guard goes back to the very first one. Everything is decided from numbers all processes share.

    Args:
        settings: when it acts.
        tensors: the live ones by name; read for snapshots, written by a return.
        optimizer: its state goes with them.

    Attributes:
        rate: what the learning rate is multiplied by, 1 before the first return.
        skipped, returns: how often either happened so far.
    """

    def __init__(
        self, settings: GuardSettings, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.settings, self.optimizer = settings, optimizer
        self.live = {name: tensor.detach() for name, tensor in tensors.items()}
        self.rate, self.skipped, self.returns, self.in_a_row = 1.0, 0, 0, 0
        self.recent: list[float] = []
        self.first = self.last = self.look(0)
        self.fresh = True

    def look(self, step: int) -> Snapshot:
        """Return copies of what trains and of the optimizer's state."""
        return Snapshot(step, {k: v.clone() for k, v in self.live.items()}, copy.deepcopy(self.optimizer.state_dict()))

    def fault(self, loss: float, norm: float) -> str | None:
        """Return what is wrong with a step's loss and gradient norm, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradients' norm is {norm}"
        limit = self.settings.spike
        if limit and len(self.recent) >= ENOUGH and loss > limit * statistics.median(self.recent):
            return (
                f"the loss is {loss:.3g}, over {limit:g} times the recent median {statistics.median(self.recent):.3g}"
            )
        return None

    def passed(self, step: int, loss: float) -> None:
        """Note a good step, before its update; takes a snapshot if one is due."""
        calm = not self.recent or loss <= CALM * statistics.median(self.recent)
        if calm and step - self.last.step >= self.settings.every:
            self.last, self.fresh = self.look(step), True
        self.in_a_row = 0
        self.recent = [*self.recent, loss][-RECENT:]

    def failed(self, step: int, reason: str) -> str:
        """Note a bad step, whose update is to be skipped; after a streak, return to a good state. Return what to say.

        Raises:
            FloatingPointError: if it has returned too often to go on.
        """
        self.skipped += 1
        self.in_a_row += 1
        said = f"step {step + 1} skipped: {reason}"
        if self.in_a_row < self.settings.streak:
            return said
        if self.returns >= self.settings.most_returns:
            again = (
                f" The run broke again after {self.returns} returns to a good adapter, now at {self.rate:.1e} times the learning "
                "rate asked for."
            )
            raise FloatingPointError(
                f"step {step + 1}: {reason}.{again if self.returns else ''} Start again with a lower --lr (the demo: --base-lr, "
                "--adapter-lr, --full-lr), or look at the data."
            )
        snapshot = self.last if self.fresh else self.first
        if snapshot is self.first:
            self.recent = []  # its loss says nothing about the loss there
        self.restore(snapshot)
        self.last = dataclasses.replace(snapshot, step=step)  # the next one is due ``every`` steps from here
        self.fresh, self.in_a_row = False, 0
        self.returns += 1
        self.rate *= self.settings.lower
        return (
            f"{said}; {self.settings.streak} in a row, so back to the good adapter of step {snapshot.step}, "
            f"with the learning rate at {self.rate:.3g} of the schedule's from here on"
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Write a snapshot into the live tensors and the optimizer, in place; it stays usable."""
        for name, tensor in self.live.items():
            tensor.copy_(snapshot.tensors[name])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))

    def state(self) -> dict[str, Any]:
        """Return everything a checkpoint has to keep of the guard."""
        names = ("rate", "skipped", "returns", "in_a_row", "recent", "fresh")
        kept: dict[str, Any] = {name: getattr(self, name) for name in names}
        kept["first"], kept["last"] = vars(self.first), None if self.last is self.first else vars(self.last)
        return kept

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned, in place."""
        for name in ("rate", "skipped", "returns", "in_a_row", "recent", "fresh"):
            setattr(self, name, state[name])
        self.first = Snapshot(**state["first"])
        self.last = self.first if state["last"] is None else Snapshot(**state["last"])
