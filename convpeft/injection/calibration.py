"""Re-estimate the statistics of the norms that the active adapters own, exactly, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import StateError, shortened
from ..hosts.model import AdaptedModel
from ..hosts.modules import is_batchnorm_like
from ..hosts.uncompiled import uncompiled
from ..hosts.wrappers import inside
from ..planning.examples import call_example

Run = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` did; print it.

    Attributes:
        norms: names of those that have new statistics.
        unreached: of those that the adapters own and no batch ran through; they keep what they had.
        batches: that this process ran.
    """

    norms: tuple[str, ...]
    unreached: tuple[str, ...]
    batches: int

    def __str__(self) -> str:
        text = f"{len(self.norms)} norms have the statistics of {self.batches} batches"
        if self.unreached:
            text += f"; {len(self.unreached)} did not run and keep theirs: {shortened(list(self.unreached))}"
        return text


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, run: Run | None = None, training: bool = False, progress: bool = True
) -> Calibration:
    """Re-estimate the statistics that the active adapters own from all batches, in place, and return what was done.

    Owned are the norms of ``norm: affine`` and ``adapt``, those below ``unfreeze``, and norms inside adapters. Before a
    training this gives the base the statistics of the new data; after one, it replaces the moving averages, which weigh
    the last batches most.

    Each norm gets the mean and the unbiased variance of everything that reached it in the pass, pooled over pixels and
    batches in float64 (Chan's update), not an average of averages: the order of the batches changes nothing but rounding.
    During the pass each of these norms normalises with its *batch's own* moments, as BatchNorm does in training. So the
    inputs of a later norm are normalised ones whatever the old statistics were, and one pass gives all layers; with the old
    statistics, a later norm would be fitted to maps that the new ones of the norms before it do away with. What is left is
    that a batch's moments are not the pooled ones: take batches as large as memory allows (they need no gradients).

    All else runs in eval mode, and nothing but the statistics changes. If anything is raised, nothing has.
    With ``torch.distributed`` all processes have to call it together; each runs its own batches and all get the
    moments of them all.

    Args:
        model: an injected model.
        batches: any iterable of inputs. Each is passed to the model as ``example_inputs`` are: a tuple holds positional
            inputs, a mapping keyword arguments.
        run: called as ``run(model, batch)`` instead, where a batch is more than the inputs: ``lambda model, batch:
            model(batch[0])``.
        training: run all but these norms in training mode, for a ``run`` that takes losses only there.
        progress: show a bar.

    Raises:
        StateError: if no adapter is active, the active ones own no statistics, there is no batch, or the moments are not
            finite; in words what to do.

    Reference: Wu and Johnson, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3 (PreciseBN); Chan et al., Updating
    formulae and a pairwise algorithm for computing sample variances, 1979.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> _ = convpeft.inject(model, {"norm": "affine"})
        >>> print(calibrate(model, [torch.randn(4, 3, 8, 8) for _ in range(5)], progress=False))
        1 norms have the statistics of 5 batches
    """
    adapted = AdaptedModel.of(model)
    adapted.require_hosts()
    adapted.require_unrouted()
    norms = owned_norms(adapted)
    if not norms:
        raise StateError(_nothing_owned(adapted))
    found = {name: Moments(norm) for name, norm in norms.items()}
    count = 0
    with _agreed(list(found.values())), _measuring(inside(model), found, training), torch.no_grad(), uncompiled():
        for batch in with_bar(batches, progress, "calibrate"):
            (run or call_example)(inside(model), batch)
            count += 1
        if not count:
            raise StateError("there was no batch to calibrate with; the model is unchanged. An iterator runs once only")
    reached = {name: moments for name, moments in found.items() if moments.count}
    if not reached:
        raise StateError(
            f"no batch reached any of the {len(found)} norms that the active adapters own; the model is unchanged. What does "
            "run() call? It has to run the model it is given"
        )
    unsound = [name for name, moments in reached.items() if not moments.is_sound()]
    if unsound:
        raise StateError(
            f"the moments of {shortened(unsound)} are not finite or belong to one value alone; the model is unchanged. Look at "
            "the batches, or give more of them"
        )
    for moments in reached.values():
        moments.write()
    return Calibration(tuple(reached), tuple(name for name in found if name not in reached), count)


def owned_norms(adapted: AdaptedModel) -> dict[str, nn.Module]:
    """Return the norms with statistics that belong to the active adapters, each once, by name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name in adapted.state.active:
        below = [(key, adapted.module(key)) for key in adapted.record(name).owned]
        for layer, adapter in adapted.adapters(name):
            below += [(f"{layer}: {name}.{key}", module) for key, module in adapter.named_modules()]
        for key, module in below:
            if is_batchnorm_like(module) and module._buffers.get("running_mean") is not None:
                found.setdefault(id(module), (key, module))
    return dict(found.values())


def _nothing_owned(adapted: AdaptedModel) -> str:
    active = adapted.state.active
    if not active:
        return "no adapter is active, and the base's statistics stay: convpeft.set_active(model, name) first"
    policies = ", ".join(f"{name!r} (norm: {adapted.record(name).norm})" for name in active)
    return (
        f"the active adapters own no statistics: {policies}, and no norm with running statistics is unfrozen. The base's stay as "
        "they are. Inject with norm: affine (statistics held, and calibrated) or norm: adapt; the model is unchanged."
    )


class Moments:
    """Pooled mean and variance of each channel of all that reached one norm.

    Attributes:
        count: values for each channel so far.
        mean, squares: mean and sum of squared deviations, ``(C,)``, in float64 (float32 where a device has none).
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.kept = norm._buffers["running_mean"], norm._buffers["running_var"]
        mean = self.kept[0]
        assert mean is not None
        dtype = torch.float32 if mean.device.type == "mps" else torch.float64
        self.count = 0
        self.mean = torch.zeros(mean.shape, dtype=dtype, device=mean.device)
        self.squares = torch.zeros_like(self.mean)

    def see(self, norm: nn.Module, args: Any, kwargs: Any) -> None:
        """Add a batch, and let the norm normalise with that batch's own moments; a forward pre-hook."""
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
        if x.ndim < 2 or x.shape[1] != len(self.mean):
            raise StateError(
                f"a {type(norm).__name__} got an input of shape {tuple(x.shape)} and has {len(self.mean)} channels; calibrate "
                "reads channels from axis 1 of a batch. Give batches, not single samples; the model is unchanged."
            )
        values = x.detach().transpose(0, 1).reshape(len(self.mean), -1).to(self.mean.dtype)
        variance, mean = torch.var_mean(values, 1, correction=0)
        self.add(values.shape[1], mean, variance * values.shape[1])
        for name, value, kept in zip(("running_mean", "running_var"), (mean, variance), self.kept, strict=True):
            norm._buffers[name] = value.to(kept.dtype)  # type: ignore[union-attr]

    def add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add the moments of another part of the data, in place."""
        total = self.count + count
        if total:
            change = mean - self.mean
            self.squares += squares + change.square() * (self.count * count / total)
            self.mean += change * (count / total)
            self.count = total

    def is_sound(self) -> bool:
        """Return whether these can be the statistics of a norm."""
        return self.count > 1 and bool(torch.isfinite(self.mean).all() and torch.isfinite(self.squares).all())

    def put_back(self) -> None:
        """Give the norm the statistics that it had, in place."""
        self.norm._buffers["running_mean"], self.norm._buffers["running_var"] = self.kept

    def write(self) -> None:
        """Write the pooled statistics into the norm's own tensors, in place."""
        for kept, value in zip(self.kept, (self.mean, self.squares / (self.count - 1)), strict=True):
            kept.copy_(value)  # type: ignore[union-attr]


@contextmanager
def evaluating(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Set eval mode (``training``: training mode, but for norms) inside the block; modes are as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training and not is_batchnorm_like(module)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _measuring(model: nn.Module, moments: dict[str, Moments], training: bool) -> Iterator[None]:
    """Let norms collect the moments of what reaches them inside the block; modes, buffers and hooks are as before after it."""
    handles = []
    try:
        for each in moments.values():
            handles.append(each.norm.register_forward_pre_hook(each.see, with_kwargs=True))
        with evaluating(model, training=training):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for each in moments.values():
            each.put_back()


@contextmanager
def _agreed(moments: list[Moments]) -> Iterator[None]:
    """Add up the moments of all processes when the block ends, in the same order everywhere; raise in all if one raises.

    Raises:
        StateError: in the processes that did not fail themselves.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        others = _gather(moments, failed) if dist.is_available() and dist.is_initialized() else []
    broken = [rank for rank, flat in enumerate(others) if flat[0]]
    if broken:
        raise StateError(f"calibrate failed in process {broken[0]}; its own error says why. The model is unchanged.")
    if len(others) > 1:
        for each in moments:
            each.count = 0
            each.mean.zero_()
            each.squares.zero_()
        for flat in others:
            _add_all(moments, flat[1:])


def _gather(moments: list[Moments], failed: bool) -> list[Tensor]:
    """Return, for each process, one vector: whether it failed, then count, mean and squares of each norm."""
    parts = [torch.tensor([float(failed)], dtype=moments[0].mean.dtype, device=moments[0].mean.device)]
    for each in moments:
        parts += [
            parts[0].new_tensor([float(each.count)]),
            each.mean.to(parts[0].device),
            each.squares.to(parts[0].device),
        ]
    flat = torch.cat(parts)
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return found


def _add_all(moments: list[Moments], flat: Tensor) -> None:
    for each in moments:
        width = len(each.mean)
        count, mean, squares = flat.split([1, width, width, len(flat) - 1 - 2 * width])[:3]
        each.add(int(count), mean.to(each.mean.device), squares.to(each.mean.device))
        flat = flat[1 + 2 * width :]


def with_bar(batches: Iterable[Any], progress: bool, title: str) -> Iterable[Any]:
    """Return an iterable that shows a bar in the first process, if there is to be one."""
    from tqdm.auto import tqdm

    quiet = not progress or (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)
    return tqdm(batches, desc=title, unit="batch", disable=quiet)
