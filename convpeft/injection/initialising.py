"""Choose the directions in which fresh adapters read their inputs: random ones, or those that the data or the loss prefer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Adapter, Entrance
from ..errors import OptionError, StateError, shortened, shown
from ..hosts.model import AdaptedModel
from ..hosts.uncompiled import uncompiled
from ..hosts.wrappers import inside
from ..planning.examples import call_example
from .calibration import Run, evaluating, with_bar
from .directions import InputSketch, KernelGradients, Loss, is_fresh, require_one_process, run_losses

METHODS = ("kaiming", "orthogonal", "eva", "gradient")
_MORE = 8  # random rows beyond the rank, for the sketch to be exact enough
_NORM = 1 / math.sqrt(3)  # of a row as Kaiming's uniform values with a = sqrt(5) have it, in the mean


@dataclass(frozen=True)
class Initialisation:
    """What ``initialise`` did; print it.

    Attributes:
        method: that chose the directions.
        changed: ``layer: adapter`` of each that has new ones.
        left: of each that keeps its own, with the reason.
    """

    method: str
    changed: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        text = f"{len(self.changed)} adapters read the directions of {self.method!r}"
        for reason in dict.fromkeys(self.left.values()):
            text += f"; {reason}: {shortened([key for key, why in self.left.items() if why == reason])}"
        return text


def initialise(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    method: str = "gradient",
    loss: Loss | None = None,
    run: Run | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Initialisation:
    """Choose the directions in which the active adapters read their inputs (A of LoRA, D of Rep-MoNA), in place.

    B and U stay zero, so no output changes, bit for bit; adapters that have trained already are refused. All methods give
    each direction the length that Kaiming's initial values have in the mean, so that rates keep their meaning.

    Args:
        model: an injected model, not trained yet; calibrated, if it is to be.
        batches: any iterable of inputs for ``eva``, of batches for ``gradient``; a few are enough.
        method: ``kaiming`` (random, as at injection), ``orthogonal`` (random, at right angles), ``eva`` (the main directions
            of what the adapter reads), ``gradient`` (those in which the kernel's gradient is largest: the first steps of B
            then follow full fine-tuning's as closely as the rank allows).
        loss: for ``gradient``, called as ``loss(model, batch)``; returns a scalar. The model is in training mode, norms held.
        run: for ``eva``, called as ``run(model, batch)`` where a batch is more than the inputs; see ``calibrate``.
        seed: of all random numbers.
        progress: show a bar.

    Raises:
        OptionError: if the method is unknown.
        StateError: if no adapter is active, one is no longer fresh, nothing to be initialised ran, or under several processes.

    Reference: Paischer et al., EVA, arXiv:2410.07170, section 3; Wang et al., LoRA-GA, arXiv:2407.05000, section 3.2, here with
    B = 0.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
        >>> _ = convpeft.inject(model, {"rules": [{"match": ["0", "2"], "kind": "lora", "rank": 2}]})
        >>> images = [torch.randn(4, 3, 8, 8) for _ in range(2)]
        >>> print(initialise(model, images, loss=lambda model, x: model(x).square().mean(), progress=False))
        2 adapters read the directions of 'gradient'
    """
    if method not in METHODS:
        raise OptionError(f"method must be one of {', '.join(METHODS)}, not {shown(method)}")
    require_one_process()
    wanted, left = _entrances(AdaptedModel.of(model))
    generator = torch.Generator().manual_seed(seed)
    if method == "eva":
        found = _of_inputs(model, wanted, batches, run, generator, progress)
    elif method == "gradient":
        if loss is None:
            raise StateError("method 'gradient' needs loss=, called as loss(model, batch); the model is unchanged")
        found = _of_gradients(model, wanted, batches, loss, progress)
    else:
        found = {label: _random(entrance, method, generator) for label, (_, entrance) in wanted.items()}
    silent = [label for label in wanted if label not in found]
    if len(silent) == len(wanted):
        raise StateError(
            f"none of the {len(wanted)} adapters ran on these batches, or no gradient reached them; the model is unchanged. "
            "convpeft.check(model, *inputs) says why"
        )
    with torch.no_grad():
        for label, rows in found.items():
            wanted[label][1].weight.copy_(rows)
    return Initialisation(method, tuple(found), {**left, **dict.fromkeys(silent, "did not run and keep theirs")})


def _entrances(adapted: AdaptedModel) -> tuple[dict[str, tuple[Adapter, Entrance]], dict[str, str]]:
    """Return the active adapters with directions to choose, and the others with the reason, by ``layer: adapter``."""
    adapted.require_hosts()
    adapted.require_unrouted()
    found: dict[str, tuple[Adapter, Entrance]] = {}
    left: dict[str, str] = {}
    trained: list[str] = []
    for name in adapted.state.active:
        for layer, adapter in adapted.adapters(name):
            label, entrance = f"{layer}: {name}", adapter.entrance()
            if entrance is None:
                left[label] = "kinds without such directions"
            elif not is_fresh(adapter):
                trained.append(label)
            else:
                found[label] = (adapter, entrance)
    if trained:
        raise StateError(
            f"{shortened(trained)} trained already, and other directions would change the outputs; the model is unchanged. "
            "Initialise right after inject()"
        )
    if not found:
        raise StateError("no active adapter has directions to choose: activate one with lora or rep_mona adapters")
    return found, left


def _of_inputs(
    model: nn.Module,
    wanted: dict[str, tuple[Adapter, Entrance]],
    batches: Iterable[Any],
    run: Run | None,
    generator: torch.Generator,
    progress: bool,
) -> dict[str, Tensor]:
    """Return the main directions of what adapters read, for those that ran."""
    sketches: dict[str, InputSketch] = {}
    for label, (adapter, entrance) in wanted.items():
        host = adapter.site.geometry
        geometry = (
            host if entrance.reads == "kernel" else host.pointwise(host.in_channels, host.out_channels, host.groups)
        )
        if entrance.reads == "centre":
            geometry = host.resized((1, 1))
        sketches[label] = InputSketch(geometry, len(entrance.weight) // host.groups + _MORE, generator)
    hooks: dict[str, Callable[..., Any]] = {label: sketch.see for label, sketch in sketches.items()}
    handles = [wanted[label][0].register_forward_pre_hook(hook) for label, hook in hooks.items()]
    plain = inside(model)
    try:
        with evaluating(plain), torch.no_grad(), uncompiled():
            for batch in with_bar(batches, progress, "initialise"):
                (run or call_example)(plain, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        label: _directions(sketch.total, wanted[label][1].weight, wanted[label][0].site.geometry.groups)
        for label, sketch in sketches.items()
        if bool(sketch.total.any())
    }


def _of_gradients(
    model: nn.Module,
    wanted: dict[str, tuple[Adapter, Entrance]],
    batches: Iterable[Any],
    loss: Loss,
    progress: bool,
) -> dict[str, Tensor]:
    """Return the directions in which the kernels' gradients are largest, for the adapters that a gradient reached."""
    gradients = {label: KernelGradients(adapter.site.geometry) for label, (adapter, _) in wanted.items()}
    handles = [wanted[label][0].register_forward_hook(each.see) for label, each in gradients.items()]
    try:
        run_losses(model, batches, loss, list(gradients.values()), title="initialise", progress=progress)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for label, each in gradients.items():
        adapter, entrance = wanted[label]
        if each.whole is not None and bool(each.whole.any()):
            seen = as_read(each.whole, entrance.reads)
            found[label] = _directions(seen, entrance.weight, adapter.site.geometry.groups)
    return found


def as_read(kernel: Tensor, reads: str) -> Tensor:
    """Return a kernel's gradient ``(out, in, kh, kw)`` with rows as an adapter's entrance reads them.

    Args:
        kernel: the gradient.
        reads: see ``Entrance``.
    """
    if reads == "kernel":
        return kernel
    if reads == "centre":
        height, width = ((size - 1) // 2 for size in kernel.shape[2:])
        return kernel[:, :, height : height + 1, width : width + 1]
    return kernel.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]


def _directions(seen: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the main directions of the rows of each group, in the shape of a weight; what they lack in rank stays as it is."""
    found = weight.detach().clone()
    rows = seen.to(weight.device, torch.float32).unflatten(0, (groups, -1)).flatten(2)
    places = found.unflatten(0, (groups, -1)).flatten(2)
    for place, group in zip(places, rows, strict=True):
        _, energies, directions = torch.linalg.svd(group, full_matrices=False)
        count = min(len(place), int((energies > 1e-6 * energies[0]).sum()))
        signs = directions[:count].sum(1, keepdim=True).sign()  # LAPACK leaves the sign open
        place[:count] = (directions[:count] * torch.where(signs == 0, 1.0, signs) * _NORM).to(place.dtype)
    return found


def _random(entrance: Entrance, method: str, generator: torch.Generator) -> Tensor:
    weight = torch.empty(entrance.weight.shape)
    rows = weight.flatten(1)
    if method == "kaiming":
        bound = 1 / math.sqrt(rows.shape[1])
        return weight.uniform_(-bound, bound, generator=generator)
    for start in range(0, len(rows), rows.shape[1]):  # more rows than dimensions: several bases
        part = rows[start : start + rows.shape[1]]
        basis, triangle = torch.linalg.qr(torch.randn(rows.shape[1], len(part), generator=generator))
        part.copy_((basis * triangle.diagonal().sign()).T * _NORM)
    return weight
