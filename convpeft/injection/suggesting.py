"""Find out on a few batches where adapters pay, and spend a budget of parameters there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..adapters.base import Adapter, Site
from ..adapters.options import fits, read_options
from ..adapters.registry import adapter_class, make_adapter
from ..convolution.geometry import PLAIN_HOSTS
from ..errors import OptionError, StateError, shown
from ..hosts.model import AdaptedModel, whole
from ..hosts.modules import base_class, is_batchnorm_like, unique_modules
from ..planning.bypasses import bypassed
from ..planning.globs import quoted
from ..planning.planner import FEW
from ..planning.rules import Rule, Unfreeze, is_whole
from ..planning.sites import Sites, Wanted, host_refusal
from ..planning.spec import Spec
from .calibration import calibrate, owned_norms
from .directions import KernelGradients, Loss, require_one_process, run_losses
from .inject import eject, inject
from .suggestion import Choice, Layer, Suggestion

RANKS = (1, 2, 4, 8, 16, 32)
UP_MULT, HEAD_MULT = 4.0, 0.5  # relative rates of B and U, and of layers that train whole
_NAME = "suggest"
_STEPS = 6  # batches; a forward and a backward pass and one without gradients each


def suggest(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    budget: float = 0.025,
    merge: bool = True,
    steps: int = _STEPS,
    seed: int = 0,
    progress: bool = True,
) -> Suggestion:
    """Return a spec that spends a budget of parameters where a few batches say that it lowers the loss most, with reasons.

    The norms are calibrated on the batches first, on copies. Then each layer's whole kernel gradient is taken, over the
    batches with an even and with an odd number apart. What an adapter of rank r gains is how far the loss falls, to first
    order, for one step of Adam (a step of its rate along the *sign* of each weight's gradient) whose directions and signs
    come from one half of the batches and whose effect is measured on the other half, so that noise gains nothing. LoRA is
    credited with the first r singular directions of the kernel's gradient, Rep-MoNA with the part of each that one filter
    over pixels times one over channels can have; a layer trained whole with all of it. The choices of a layer are reduced
    to their convex hull over parameters, and the steepest parts of all hulls are taken until the budget is spent (the
    multiple-choice knapsack's relaxation). The model is as before afterwards, bit for bit.

    Args:
        model: any module without adapters.
        batches: any iterable of batches; the first ``steps`` are used. Give batches as you will train on.
        loss: called as ``loss(model, batch)``; returns a scalar. The model is in training mode, its norms held.
        budget: trainable parameters as a share of the model's.
        merge: use kinds only that merge into the model; False allows ``conv_lora`` on 3x3 layers and larger as well.
        steps: how many batches are used, at least 2; one costs about as much as 1.5 training steps.
        seed: of dropout and other random numbers in the model.
        progress: show bars.

    Raises:
        OptionError: if ``budget`` is no share above 0, or ``steps`` no number of at least 2.
        StateError: if the model has adapters, there are fewer than 2 batches, no layer can be adapted, the budget is too small
            for any choice, or under several processes.

    Example:
        >>> import torch, convpeft
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1))
        >>> images = [torch.randn(4, 3, 8, 8) for _ in range(4)]
        >>> found = suggest(model, images, lambda model, x: model(x).square().mean(), budget=0.2, progress=False)
        >>> convpeft.plan(model, found.spec).trainable_parameters <= 0.2 * 516
        True
    """
    if not fits(budget, float) or not 0 < budget <= 1:
        raise OptionError(f"budget is a share of the model's parameters, above 0 and at most 1, not {shown(budget)}")
    if not is_whole(steps) or steps < 2:
        raise OptionError(f"steps is a whole number of batches of at least 2, not {shown(steps)}")
    require_one_process()
    root = whole(model)
    if AdaptedModel.find(root) is not None:
        raise StateError(
            "suggest measures a model without adapters: convpeft.eject(model) first, or give a copy without"
        )
    given = list(islice(iter(batches), steps))
    if len(given) < 2:
        raise StateError(
            f"suggest needs 2 batches or more, one half to choose by and one to measure on, not {len(given)}"
        )
    hosts = _hosts(root)
    if not hosts:
        raise StateError(f"no layer of this {base_class(root).__name__} can have an adapter beside it")
    base = sum(parameter.numel() for parameter in root.parameters())
    gradients, norms = _measure(root, list(hosts), given, loss, seed, progress)
    layers = [_layer(name, site, hosts[name][1], gradients[name], merge) for name, (site, _) in hosts.items()]
    norm = Layer("(norms)", "", 0, [Choice("norms", 0, norms[0], norms[1])] if norms[0] and norms[1] > 0 else [])
    chosen = _spend([norm, *layers], int(budget * base))
    if not any(chosen):
        raise StateError(f"{100 * budget:g} % of {base:,} parameters is too little for any adapter that gains anything")
    spec = _spec(chosen, layers, _batch_size(given[0]))
    return Suggestion(spec, budget, base, tuple(layers), tuple(chosen[1:]), chosen[0], len(given))


def _hosts(root: nn.Module) -> dict[str, tuple[Site, int]]:
    """Return, by name, the site beside each layer that can have one and that low-rank updates suit, and its parameters."""
    modules = dict(unique_modules(root))
    past = bypassed(modules.values())
    options, _ = read_options("lora", adapter_class("lora").Options, {"rank": 1})
    assert options is not None
    wanted = [
        Wanted(name, module, "", "lora", "parallel", options, 1, 1.0, None)
        for name, module in modules.items()
        if isinstance(module, PLAIN_HOSTS) and host_refusal(module, "parallel", past) is None
    ]
    found: dict[str, tuple[Site, int]] = {}
    for layer in Sites(root, wanted, past).layers:  # the others have a reason, and get nothing
        geometry = layer.site.geometry
        if not geometry.transposed and (geometry.groups == 1 or geometry.in_per_group > 1):
            own = [parameter for parameter in modules[layer.name]._parameters.values() if parameter is not None]
            found[layer.name] = (layer.site, sum(parameter.numel() for parameter in own))
    return found


def _measure(
    root: nn.Module, names: list[str], batches: list[Any], loss: Loss, seed: int, progress: bool
) -> tuple[dict[str, KernelGradients], tuple[int, float]]:
    """Return the kernels' gradients by layer, and for all norms together their parameters and their gain."""
    rule = Rule([quoted(name) for name in names], "lora", rank=1)
    devices = sorted({tensor.device.index or 0 for tensor in root.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        inject(root, Spec([rule], norm="affine"), name=_NAME)
        try:
            adapted = AdaptedModel.of(root)
            if owned_norms(adapted):
                calibrate(root, batches, run=loss, training=True, progress=progress)
            seen = {layer: KernelGradients(adapter.site.geometry) for layer, adapter in adapted.adapters(_NAME)}
            for layer, adapter in adapted.adapters(_NAME):
                adapter.register_forward_hook(seen[layer].see)
            scales = [p for norm in owned_norms(adapted).values() for p in norm.parameters() if p.requires_grad]
            halves = [[torch.zeros_like(scale, dtype=torch.float32) for scale in scales] for _ in range(2)]

            def after(half: int) -> None:
                for total, scale in zip(halves[half], scales, strict=True):
                    if scale.grad is not None:
                        total += scale.grad

            run_losses(root, batches, loss, list(seen.values()), title="suggest", progress=progress, after=after)
        finally:
            eject(root, _NAME)
    gain = sum(_held_out(even, odd) + _held_out(odd, even) for even, odd in zip(*halves, strict=True)) / 2
    count = sum(
        p.numel() for module in root.modules() if is_batchnorm_like(module) for p in module.parameters(recurse=False)
    )
    return seen, (count, float(gain))


def _held_out(one: Tensor, other: Tensor) -> float:
    """Return how far the loss of one half falls, per rate, for a step along the sign of the other half's gradient."""
    return float((one.sign() * other).sum())


def _layer(name: str, site: Site, own: int, gradients: KernelGradients, merge: bool) -> Layer:
    """Return a layer with all that it could have: parameters and gain of each."""
    even, odd = gradients.halves
    layer = Layer(name, str(site.geometry), gradients.pixels * site.geometry.macs)
    if not (isinstance(even, Tensor) and isinstance(odd, Tensor)):
        return layer  # no gradient came in one half
    whole_gain = HEAD_MULT * (_held_out(even, odd) + _held_out(odd, even)) / 2
    steps = [_gains(one, other, site) for one, other in ((even, odd), (odd, even))]
    kernel, pixel = (torch.stack(each).mean(0) for each in zip(*steps, strict=True))
    kinds = {"lora": kernel, "rep_mona": pixel}
    if not merge and site.geometry.kernel_size[0] > 1:
        kinds["conv_lora"] = kernel
    for kind, gains in kinds.items():
        total = gains.cumsum(0)
        for rank in RANKS:
            cost = _parameters(kind, site, rank)
            if cost is not None and cost < own and rank <= len(total):
                layer.choices.append(Choice(kind, rank, cost, UP_MULT * float(total[rank - 1])))
    layer.choices.append(Choice("whole", 0, own, whole_gain))
    return layer


def _gains(one: Tensor, other: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Return what each direction of one half's gradient gains on the other half, for LoRA and for Rep-MoNA.

    Returns:
        Two vectors, one entry for each rank: with the whole kernel of A, and with one filter over pixels times one over
        channels.
    """
    groups, most = site.geometry.groups, max(RANKS)
    kernel, pixel = torch.zeros(most), torch.zeros(most)
    for mine, theirs in zip(one.unflatten(0, (groups, -1)), other.unflatten(0, (groups, -1)), strict=True):
        rows = mine.flatten(1)
        _, _, directions = (
            torch.linalg.svd(rows, full_matrices=False) if min(rows.shape) <= most else _leading(rows, most)
        )
        directions = directions[:most]
        slopes, held = directions @ rows.T, directions @ theirs.flatten(1).T  # gradients of B's columns
        gains = (slopes.sign() * held).sum(1).clamp(min=0).cpu() / 3**0.5
        shapes = directions.unflatten(1, (mine.shape[1], -1))  # (rank, in, pixels)
        moments = shapes.transpose(1, 2) @ shapes
        parts = torch.linalg.eigvalsh(moments)[:, -1].clamp(0, 1).sqrt().cpu()
        kernel[: len(gains)] += gains
        pixel[: len(gains)] += gains * parts
    return kernel, pixel


def _leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading part of a singular value decomposition, from the smaller of its two Gram matrices."""
    if rows.shape[0] <= rows.shape[1]:
        energies, left = torch.linalg.eigh(rows @ rows.T)
        left = left.flip(1)[:, :count]
        values = energies.flip(0)[:count].clamp(min=0).sqrt()
        right = (left.T @ rows) / values.clamp(min=1e-12)[:, None]
    else:
        energies, found = torch.linalg.eigh(rows.T @ rows)
        right = found.flip(1)[:, :count].T
        values = energies.flip(0)[:count].clamp(min=0).sqrt()
        left = rows @ right.T
    return left, values, right


def _parameters(kind: str, site: Site, rank: int) -> int | None:
    """Return how many parameters an adapter has, or None if the kind refuses the site or rounds the rank up."""
    kinds: type[Adapter] = adapter_class(kind)
    options, _ = read_options(kind, kinds.Options, {"rank": rank})
    if options is None or site.place not in kinds.places or kinds.refuses(site, options) or rank < site.geometry.groups:
        return None
    return sum(parameter.numel() for parameter in make_adapter(kind, site, options, "meta").parameters())


def _spend(layers: list[Layer], budget: int) -> list[Choice | None]:
    """Return what each layer gets: the steepest parts of all hulls, while they fit."""
    ways = [list(_hull(layer.choices)) for layer in layers]
    taken = [-1] * len(layers)
    left = budget
    closed: set[int] = set()
    while True:
        best: tuple[float, int] | None = None
        for number, way in enumerate(ways):
            if number not in closed and taken[number] + 1 < len(way):
                gain, cost = _step(way, taken[number])
                if best is None or gain / cost > best[0]:
                    best = (gain / cost, number)
        if best is None:
            return [way[at] if at >= 0 else None for way, at in zip(ways, taken, strict=True)]
        number = best[1]
        _, cost = _step(ways[number], taken[number])
        if cost <= left:
            left -= cost
            taken[number] += 1
        else:
            closed.add(number)


def _step(way: list[Choice], at: int) -> tuple[float, int]:
    before = way[at] if at >= 0 else Choice("", 0, 0, 0.0)
    return way[at + 1].gain - before.gain, way[at + 1].parameters - before.parameters


def _hull(choices: list[Choice]) -> Iterator[Choice]:
    """Yield the choices on the upper convex hull of gain over parameters, the cheapest first."""
    at = Choice("", 0, 0, 0.0)
    while True:
        dearer = [each for each in choices if each.parameters > at.parameters and each.gain > at.gain]
        if not dearer:
            return
        at = max(dearer, key=lambda each: ((each.gain - at.gain) / (each.parameters - at.parameters), each.parameters))
        yield at


def _spec(chosen: list[Choice | None], layers: list[Layer], batch_size: int | None) -> Spec:
    """Return the choices as a spec: one rule for each kind and rank."""
    rules: dict[tuple[str, int], list[str]] = {}
    for layer, choice in zip(layers, chosen[1:], strict=True):
        if choice is not None:
            rules.setdefault((choice.kind, choice.rank), []).append(quoted(layer.name))
    unfrozen = rules.pop(("whole", 0), [])
    norm = "frozen" if chosen[0] is None else "adapt" if (batch_size or 0) >= FEW else "affine"
    return Spec(
        [Rule(names, kind, rank=rank, up_mult=UP_MULT) for (kind, rank), names in sorted(rules.items())],
        [Unfreeze(unfrozen, lr_mult=HEAD_MULT)] if unfrozen else [],
        norm,
    )


def _batch_size(batch: Any) -> int | None:
    """Return how many images a batch has: the length of its first image tensor, or of its first list of images."""
    for leaf in tree_flatten(batch, is_leaf=lambda each: isinstance(each, list))[0]:
        if isinstance(leaf, Tensor) and leaf.ndim == 4:
            return len(leaf)
        if isinstance(leaf, list) and leaf and all(isinstance(each, Tensor) and each.ndim == 3 for each in leaf):
            return len(leaf)
    return None
