"""What a family is: a small model with random weights, built offline, and how to run it, train it and read it.

Each function below ``@family`` returns a ``Subject``. Packages load when a family is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from convpeft.planning.globs import matches

CLASSES = 4


def _alone(images: Tensor) -> tuple[Any, ...]:
    return (images,)


def _call(model: nn.Module, images: Tensor) -> Any:
    return model(images)


@dataclass
class Subject:
    """One model under the contract.

    Attributes:
        model: in float32, with random weights and norm statistics to match them.
        loss: gives the loss a user would train with on a batch of images; the model is in training mode.
        raw: gives the outputs before thresholds and suppression, which jump where a score barely moves.
        arguments: gives what the model is called with in eval mode.
        size: of the square images.
        bare: layers that no adapter may sit beside, since a parent reads them itself or they must stay (glob patterns).
        idle: layers that take no part in inference, though they may in training (glob patterns).
        unlearned: layers that take no part in the loss (glob patterns).
        still: layers whose gradient is zero, for a reason said where they are named (glob patterns).
    """

    model: Any
    loss: Callable[[Any, Tensor], Tensor]
    raw: Callable[[Any, Tensor], Any] = _call
    arguments: Callable[[Tensor], tuple[Any, ...]] = _alone
    size: int = 64
    bare: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    unlearned: tuple[str, ...] = ()
    still: tuple[str, ...] = ()

    @property
    def match(self) -> list[str]:
        """The patterns that reach every adaptable layer."""
        return ["**", *(f"!{pattern}" for pattern in self.bare)]

    def adapts(self, name: str) -> bool:
        """Return whether ``match`` reaches the layer of that name."""
        return not any(matches(pattern, name) for pattern in self.bare)

    def images(self, count: int = 1, seed: int = 1) -> Tensor:
        """Return random images."""
        return torch.rand(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))

    def predict(self, model: nn.Module, images: Tensor) -> Any:
        """Return what a user gets."""
        return model(*self.arguments(images))


@dataclass(frozen=True)
class Family:
    """A name, the packages it needs beside torch, and the function that builds it."""

    name: str
    packages: tuple[str, ...]
    make: Callable[[], Subject]

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(package for package in self.packages if find_spec(package) is None)

    def build(self) -> Subject:
        """Return a new subject, always with the same weights and statistics, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            subject = self.make()
            _settle(subject)
        return subject


FAMILIES: dict[str, Family] = {}


def family(name: str, *packages: str) -> Callable[[Callable[[], Subject]], Callable[[], Subject]]:
    """Register the function below as a family that needs ``packages``."""

    def register(make: Callable[[], Subject]) -> Callable[[], Subject]:
        FAMILIES[name] = Family(name, packages, make)
        return make

    return register


def _settle(subject: Subject) -> None:
    """Make the model as if it were trained, in place: no weight all zero, norms with statistics of one batch.

    Some families start the last norm of a block at zero, or the last layer of a head, and nothing before it would get
    a gradient.
    """
    for module in subject.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.5 / module.weight[0].numel() ** 0.5)
    norms = [m for m in subject.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches seen
    with torch.no_grad():
        subject.raw(subject.model.train(), subject.images(4, seed=2))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var += norm.running_var.mean()  # a channel that hardly varied would magnify whatever changes it
    subject.model.eval()


def aim(layers: Iterable[Any], bias: Tensor) -> None:
    """Set the last box layer of each level to predict boxes of about its own size, as if trained, in place.

    Untrained heads would give all boxes to one level, and the others nothing to learn.
    """
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 0.1
            layer.bias.copy_(bias)


def bins(count: int) -> Tensor:
    """Return the bias for sides about one cell away: the distances themselves, or the logits of ``count`` bins each."""
    return (-4.0 * (torch.arange(count) - 1).abs()).repeat(4) if count > 1 else torch.ones(4)


def boxes(count: int = 6) -> Tensor:
    """Return square boxes of all sizes as corners between 0 and 1: every level of a pyramid has something to learn."""
    sides = torch.tensor([0.2, 0.35, 0.5, 0.65, 0.8, 0.95])[:count]
    centres = torch.tensor([0.52, 0.45, 0.5, 0.5, 0.25, 0.5])[:count]
    low, high = (centres - sides / 2).clamp(0, 1), (centres + sides / 2).clamp(0, 1)
    return torch.stack([low, low, high, high], 1)


def centred(corners: Tensor) -> Tensor:
    """Return corner boxes as centre, width and height."""
    low, high = corners[:, :2], corners[:, 2:]
    return torch.cat([(low + high) / 2, high - low], 1)


LABELS = torch.tensor([1, 2, 3, 1, 2, 3])  # of the boxes
