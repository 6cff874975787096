"""Several adapters as one file: the weighted sum of their updates, exact or at a chosen rank, with the error said.

Papers: Yadav et al., TIES-Merging, arXiv:2306.01708; Yu et al., DARE, arXiv:2311.03099. Both are applied to the updates of the
layers' kernels here, not to factors, whose signs mean nothing alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.options import read_options
from ..adapters.registry import adapter_class
from ..convolution.geometry import ConvGeometry
from ..convolution.kernels import compose, embed_on_grid
from ..errors import (
    AdapterConflict,
    AdapterFileError,
    BaseMismatch,
    GeometryError,
    MergeError,
    OptionError,
    shortened,
    shown,
)  # fmt: skip
from ..hosts.records import LayerRecord
from .header import ADAPTER, tensor_key
from .saving import write_adapter
from .stored import StoredAdapter, stored_adapters

METHODS = ("linear", "svd", "ties", "dare")
_ZERO = 1e-12  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Combination:
    """What ``combine`` wrote; print it.

    Attributes:
        path: of the file.
        method: of joining the updates.
        ranks: of the result, by layer.
        errors: by layer, the norm of what the rank leaves out, by that of the update that was wanted (Frobenius).
        error: the same over all layers together.
    """

    path: Path
    method: str
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        between = (
            f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no layers"
        )
        lines = [
            f"{self.path}: {self.method}, {len(self.ranks)} layers of {between}; relative error {self.error:.3g} (Frobenius)"
        ]
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:5]
        lines += [f"  {name or '(root)'}: {error:.3g}" for name, error in worst if error > _ZERO]
        return "\n".join(lines)


@torch.no_grad()
def combine(
    files: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    out: str | Path,
    method: str = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    name: str = "combined",
) -> Combination:
    """Write one adapter file of kind ``lora`` for the weighted sum of several adapters of one base, and return how exact it is.

    Every layer's update is taken as the kernel that it adds. ``linear`` adds them up and loses nothing: its rank is that of
    the sum, at most the sum of the ranks. ``svd`` keeps the largest ``rank`` singular values of that sum, which no other update of that rank comes nearer to
    (Eckart and Young). ``ties`` keeps the largest entries of each update, lets each place elect a sign, and takes the weighted
    mean of those that agree; ``dare`` leaves entries out at random and scales the others up; both then go the way of ``svd``.
    Groups are taken one by one.

    Args:
        files: adapter files of the same base.
        weights: one for each; unset, 1 / number of files.
        out: the file to write.
        method: one of ``linear``, ``svd``, ``ties``, ``dare``.
        rank: of the result, for all methods but ``linear``; a layer that needs less gets less.
        density: share of the entries that ``ties`` and ``dare`` keep.
        seed: of what ``dare`` leaves out.
        name: of the adapter in the file.

    Raises:
        OptionError: if an argument is out of range.
        BaseMismatch: if the files are of different bases.
        MergeError: naming every layer whose update is no kernel, or needs a larger one than the layer's.
        AdapterConflict: if the tensors that they unfroze have no weighted mean.
        AdapterFileError: if a file is damaged.
    """
    paths = [Path(each) for each in files]
    factors = _checked(paths, weights, method, rank, density)
    with stored_adapters(paths, factors, apart=True) as stored:
        _check_bases(stored)
        own = _own(stored)
        join = _join(method, density, torch.Generator().manual_seed(seed))
        made: dict[str, _Made] = {}
        reasons: dict[str, str] = {}
        for layer in dict.fromkeys(layer for each in stored for layer in each.file.layers):
            try:
                made[layer] = _combined(layer, [each for each in stored if layer in each.file.layers], join, rank)
            except (MergeError, GeometryError) as error:
                reasons[layer] = str(error)
        if reasons:
            lines = "\n".join(f"  {layer or '(root)'}: {reason}" for layer, reason in reasons.items())
            raise MergeError(f"{len(reasons)} layers cannot be combined; nothing was written.\n{lines}", reasons)
        tensors = {**own, **{key: tensor for each in made.values() for key, tensor in each.tensors.items()}}
        _write(Path(out), name, stored, made, tensors)
    wanted = math.sqrt(sum(each.wanted**2 for each in made.values()))
    lost = math.sqrt(sum(each.lost**2 for each in made.values()))
    errors = {layer: each.lost / each.wanted if each.wanted else 0.0 for layer, each in made.items()}
    ranks = {layer: each.record.options["rank"] for layer, each in made.items()}
    return Combination(Path(out), method, ranks, errors, lost / wanted if wanted else 0.0)


def _checked(
    paths: Sequence[Path], weights: Sequence[float] | None, method: str, rank: int | None, density: float
) -> list[float]:
    """Return the weights, or raise an OptionError."""
    if method not in METHODS:
        raise OptionError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if not paths:
        raise OptionError("no adapter file was given")
    factors = [1 / len(paths)] * len(paths) if weights is None else list(weights)
    if len(factors) != len(paths):
        raise OptionError(f"{len(factors)} weights for {len(paths)} adapter files")
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise OptionError(f"a weight is {shown(factor)}, not a finite number")
    if method == "linear" and rank is not None:
        raise OptionError("linear keeps everything, so its rank is that of the sum; method='svd' takes a rank")
    if method != "linear" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise OptionError(f"method {method!r} needs a rank of at least 1, not {shown(rank)}")
    if method in ("ties", "dare") and not 0 < density <= 1:
        raise OptionError(f"density must be more than 0 and at most 1, not {shown(density)}")
    if method == "ties" and min(factors) <= 0:
        raise OptionError(f"ties takes a weighted mean: weights must be positive, not {shown(min(factors))}")
    return [float(factor) for factor in factors]


def _check_bases(stored: Sequence[StoredAdapter]) -> None:
    first = stored[0]
    for each in stored[1:]:
        names = {**first.file.base, **each.file.base}
        differ = [key for key in names if first.file.base.get(key) != each.file.base.get(key)]
        if differ:
            raise BaseMismatch(
                f"{first.path} and {each.path} were made on different bases: {len(differ)} of {len(names)} layers differ "
                f"({shortened(differ)})",
                differ,
            )
        if first.file.norm != each.file.norm:
            raise AdapterConflict(f"{first.path} has norm {first.file.norm}, {each.path} has norm {each.file.norm}")


def _own(stored: Sequence[StoredAdapter]) -> dict[str, Tensor]:
    """Return the weighted mean of the tensors that the adapters unfroze or moved.

    Raises:
        AdapterConflict: if not all of them have the same ones, or the weights do not add up to 1: the base's values, which the
            rest would be of, are not in the files.
    """
    parts = [{key: each.tensors[key] for key in each.tensors if not key.startswith(f"{ADAPTER}:")} for each in stored]
    every = {key for part in parts for key in part}
    if not every:
        return {}
    for each, part in zip(stored, parts, strict=True):
        missing = sorted(key for key in every if key not in part or part[key].shape != parts[0][key].shape)
        if missing:
            raise AdapterConflict(
                f"{each.path} has no tensor like {shortened(missing, 3)} of its own, and the base's is not in the files. Merge with "
                "the base: convpeft.merge_files"
            )
    total = sum(each.coefficient for each in stored)
    if abs(total - 1) > 1e-9:
        raise AdapterConflict(
            f"the adapters bring tensors of their own ({shortened(sorted(every), 3)}), of which only a mean can be taken: the "
            f"weights have to add up to 1, not {total:g}"
        )
    found = {}
    for key, first in parts[0].items():
        if first.is_floating_point():
            mean = sum(part[key].double() * each.coefficient for each, part in zip(stored, parts, strict=True))
            found[key] = mean.to(first.dtype)  # type: ignore[union-attr]
        else:
            found[key] = first if key.endswith("num_batches_tracked") else _same(key, parts)
    return found


def _same(key: str, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
    if any(not torch.equal(part[key], parts[0][key]) for part in parts):
        raise AdapterConflict(f"{key} is of whole numbers that differ, and has no mean")
    return parts[0][key]


@dataclass(frozen=True)
class _Made:
    """The combined adapter of one layer: its record and tensors, the norm of the update that was wanted, and of the rest."""

    record: LayerRecord
    tensors: dict[str, Tensor]
    wanted: float
    lost: float


Join = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def _combined(layer: str, stored: Sequence[StoredAdapter], join: Join | None, rank: int | None) -> _Made:
    """Return the combined adapter of one layer.

    Args:
        layer: its name.
        stored: the files that have an adapter there.
        join: of the updates, ``(groups, out, in * kh * kw)`` each, and the weights; None adds them up with no loss.
        rank: of the result; None: all that there is.
    """
    records = [each.file.layers[layer] for each in stored]
    first = records[0]
    for each, record in zip(stored, records, strict=True):
        if (record.place, record.geometry, record.output) != (first.place, first.geometry, first.output):
            raise AdapterFileError(f"{stored[0].path} and {each.path} disagree on the place or geometry of {layer!r}")
    geometry = ConvGeometry.from_dict(first.geometry)
    updates = [_update(each, layer, geometry) for each in stored]
    weights = [each.coefficient for each in stored]
    wanted = _sum(updates, weights) if join is None else join(updates, weights)
    up, down = _factors(wanted, rank)
    lost = float((wanted - up @ down).norm())
    inner = up.shape[2] * geometry.groups
    dtype = _dtype(stored, layer)
    kind = adapter_class("lora")
    options, problems = read_options("lora", kind.Options, {"rank": inner})
    assert options is not None
    assert not problems
    tensors = {
        "up": up.reshape(geometry.out_channels, up.shape[2], 1, 1).to(dtype),
        "down": down.reshape(inner, geometry.in_per_group, *geometry.kernel_size).to(dtype),
    }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise MergeError(f"its combined factors overflow {dtype}")
    said = LayerRecord("lora", first.place, asdict(options), first.geometry, first.output, first.lr_mult, 1)
    keys = {tensor_key(ADAPTER, layer, key): tensor.contiguous() for key, tensor in tensors.items()}
    return _Made(said, keys, float(wanted.norm()), lost)


def _dtype(stored: Sequence[StoredAdapter], layer: str) -> torch.dtype:
    """Return the widest dtype of a layer's tensors in the files."""
    start = f"{ADAPTER}:{layer}:"
    dtypes = [tensor.dtype for each in stored for key, tensor in each.tensors.items() if key.startswith(start)]
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    found = floats[0]
    for dtype in floats:
        found = torch.promote_types(found, dtype)
    return found


def _update(stored: StoredAdapter, layer: str, geometry: ConvGeometry) -> Tensor:
    """Return what an adapter adds to a layer's kernel, ``(groups, out per group, in per group * kh * kw)`` in float64.

    Raises:
        MergeError: if it is no kernel of the layer's size.
    """
    adapter = stored.adapter(layer, torch.float64)
    if adapter.reads_host:
        raise MergeError(
            f"{stored.path}: kind {adapter.kind!r} depends on the layer's weight, which is not in the files: convpeft.merge_files"
        )
    kernel = compose(adapter.chain())
    if kernel.bias is not None and bool(kernel.bias.any()):
        raise MergeError(f"{stored.path}: kind {adapter.kind!r} adds a bias, which no lora does: convpeft.merge_files")
    size = geometry.kernel_size
    if any(own > host or (host - own) % 2 for own, host in zip(kernel.geometry.kernel_size, size, strict=True)):
        raise MergeError(
            f"{stored.path}: its kernel of {kernel.geometry.kernel_size} does not fit into the layer's of {size}: "
            "convpeft.merge_files(form='single')"
        )
    whole = embed_on_grid(kernel.weight, size, size)
    return whole.reshape(geometry.groups, geometry.out_per_group, -1)


def _factors(update: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return the best ``up`` and ``down`` of a rank for each group, ``(groups, out, r)`` and ``(groups, r, n)``."""
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    largest = float(values.max()) if values.numel() else 0.0
    needed = max(1, int((values > _ZERO * largest).sum(dim=1).max()) if largest > 0 else 1)
    kept = needed if rank is None else max(1, min(needed, rank // update.shape[0]))
    roots = values[:, :kept].sqrt()
    return left[:, :, :kept] * roots.unsqueeze(1), right[:, :kept] * roots.unsqueeze(2)


def _sum(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([update * weight for update, weight in zip(updates, weights, strict=True)]).sum(0)


def _join(method: str, density: float, generator: torch.Generator) -> Join | None:
    """Return how a method joins updates."""

    def ties(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        trimmed = torch.stack([_largest(update, density) for update in updates])
        factor = torch.tensor(weights, dtype=torch.float64).view(-1, 1, 1, 1)
        sign = (trimmed * factor).sum(0).sign()
        agreeing = (trimmed.sign() == sign) & (trimmed != 0)
        counted = (agreeing * factor).sum(0)
        return (trimmed * factor * agreeing).sum(0) / counted.masked_fill(counted == 0, 1)

    def dare(updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        kept = [torch.rand(update.shape, generator=generator, dtype=torch.float64) < density for update in updates]
        return _sum([update * keep / density for update, keep in zip(updates, kept, strict=True)], weights)

    return {"ties": ties, "dare": dare}.get(method)


def _largest(update: Tensor, density: float) -> Tensor:
    """Return an update with only its largest entries, a share ``density`` of them."""
    count = max(1, round(update.numel() * density))
    threshold = update.abs().flatten().topk(count).values[-1]
    return update * (update.abs() >= threshold)


def _write(
    path: Path, name: str, stored: Sequence[StoredAdapter], made: Mapping[str, _Made], tensors: dict[str, Tensor]
) -> None:
    first = stored[0].file
    by_options: dict[str, list[str]] = {}
    for layer, each in made.items():
        rule = {"kind": "lora", "rank": each.record.options["rank"], "place": each.record.place}
        if each.record.output is not None:
            rule["output"] = each.record.output
        by_options.setdefault(json.dumps(rule), []).append(layer)
    rules = [{"match": layers, **json.loads(rule)} for rule, layers in by_options.items()]
    spec: dict[str, Any] = {"version": 1, "rules": rules, "norm": first.norm}
    if first.owned:
        spec["unfreeze"] = [{"match": module, "lr_mult": lr_mult} for module, lr_mult in first.owned.items()]
    hosts: dict[str, Any] | None = {}
    for one in stored:
        hosts = None if hosts is None or one.file.hosts is None else {**hosts, **one.file.hosts}
    numbers = {layer: number for number, members in enumerate(by_options.values(), 1) for layer in members}
    layers = {layer: {**asdict(each.record), "rule": numbers[layer]} for layer, each in made.items()}
    base: dict[str, Any] = {"layers": first.base, **({"parts": first.parts} if first.parts else {})}
    said = {"name": name, "spec": spec, "layers": layers, "owned": first.owned, "norm": first.norm}
    write_adapter(path, said, base, tensors, hosts)
