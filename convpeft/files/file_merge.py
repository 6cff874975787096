"""Merge adapter files into the tensors of a base on disk, layer by layer; no class of a model is imported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import exact
from ..convolution.geometry import ConvGeometry
from ..convolution.kernels import ConvKernel
from ..errors import AdapterFileError, GeometryError, MergeError, OptionError, shortened, shown
from ..merging.forms import Merged, Operands, solve_kernels
from ..merging.plan import MergePlan, MergeRow
from .base_check import check_base
from .checkpoints import INDEX, Checkpoint, opened_checkpoint
from .dtypes import fitted, fitted_dtype
from .file_layers import WITH_MODEL, StoredLayer, stored_layers
from .reading import DTYPES, Entry
from .stored import StoredAdapter, stored_adapters
from .tensor_files import NAMES, TensorFile, in_file_order, size_of, tensor_file
from .writing import write

FILE_FORMS = ("auto", "single")
METADATA = "convpeft.merged"  # key of the text in a merged file that says what was merged
_RESAVE = (
    "was written before files noted what a merge has to know of their layers: load it on its base (convpeft.load_adapter) and "
    "save it again (convpeft.save_adapter)"
)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileMerge:
    """What ``merge_files`` wrote; print it.

    Attributes:
        path: of the file, or of the index of its shards.
        plan: how each layer was merged.
        files: all that were written.
        carried: names of the tensors that were taken over from the adapter files (unfrozen ones, statistics of norms).
        grown: geometries of the layers whose kernel is larger now. A model that loads the file has to be built with them.
    """

    path: Path
    plan: MergePlan
    files: tuple[Path, ...]
    carried: tuple[str, ...]
    grown: dict[str, ConvGeometry] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(self.plan), f"tensors taken over from the adapter files: {len(self.carried)}"]
        if self.grown:
            each = [f"{name}: {geometry}, padding {geometry.padding}" for name, geometry in self.grown.items()]
            lines.append(f"larger kernels, to build the model with: {shortened(each)}")
        lines.append(f"written: {shortened(list(map(str, self.files)))}")
        return "\n".join(lines)


@torch.no_grad()
def merge_files(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    form: str = "auto",
    coefficients: Sequence[float] | None = None,
    any_base: bool = False,
    prefix: str = "",
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> FileMerge:
    """Write the tensors of a base with adapters folded in, and return what was done; needs no model and none of its code.

    The tensors are, bit for bit, those of ``merge`` on the loaded model: of layers whose kernel takes the update, of all that
    the adapters unfroze, and of the buffers that their training moved. One layer at a time is in memory, and the adapters.
    Either the whole result is written or nothing is changed.

    Args:
        base: a ``.safetensors`` file, an index of shards (``*.safetensors.index.json``) or its folder, or what ``torch.save``
            wrote of a state_dict; that is read with ``weights_only=True``.
        adapters: one adapter file, or several to be added up.
        out: a ``.safetensors`` file, or an index (``*.safetensors.index.json``), beside which shards are written: those of
            the base, or new ones of ``max_shard_bytes``.
        form: ``auto``, or ``single``, which takes one larger kernel where ``auto`` would take a chain of new modules.
        coefficients: one for each file, that its update is multiplied with; unset, 1. A file that unfroze tensors takes no
            other.
        any_base: accept a base with other weights.
        prefix: of the base's keys, where the adapters were put into a part of it (``"backbone."``).
        max_shard_bytes: of new shards.
        progress: called with the bytes written so far, and those to write.

    Raises:
        MergeError: naming every layer that cannot merge, or only with new modules, with its reason; nothing was written.
        AdapterFileError: if a file is damaged, or does not fit the base.
        BaseMismatch: if the base has other weights; its ``layers`` are those that differ.
        AdapterConflict: if two files bring their own values of the same tensors.
        OptionError: if an argument is out of range.
    """
    base, out = Path(base), Path(out)
    paths = [Path(adapters)] if isinstance(adapters, (str, Path)) else [Path(each) for each in adapters]
    factors = _checked(paths, form, coefficients, max_shard_bytes)
    _check_places(base, paths, out)
    with torch.inference_mode(False), opened_checkpoint(base) as checkpoint, stored_adapters(paths, factors) as stored:
        for each in stored:
            if each.file.hosts is None:
                raise AdapterFileError(f"{each.path} {_RESAVE}")
            if each.coefficient != 1 and any(each.changed()):
                raise OptionError(
                    f"{each.path} brings tensors of its own (unfrozen ones, or statistics), which cannot be taken "
                    f"{each.coefficient:g} times: its coefficient has to be 1"
                )
            if not any_base:
                check_base(checkpoint, each.file, each.path, prefix)
        return _Merge(checkpoint, stored, prefix, form, keep=not any_base).write(out, max_shard_bytes, progress)


def _checked(
    paths: Sequence[Path], form: str, coefficients: Sequence[float] | None, max_shard_bytes: int
) -> list[float]:
    """Return the coefficients, or raise an OptionError."""
    if form not in FILE_FORMS:
        more = "; a factored merge makes new modules, and files have none" if form == "factored" else ""
        raise OptionError(f"form must be one of {', '.join(FILE_FORMS)}, not {form!r}{more}")
    if not paths:
        raise OptionError("no adapter file was given")
    factors = [1.0] * len(paths) if coefficients is None else list(coefficients)
    if len(factors) != len(paths):
        raise OptionError(f"{len(factors)} coefficients for {len(paths)} adapter files")
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise OptionError(f"a coefficient is {shown(factor)}, not a finite number")
    if max_shard_bytes < 1:
        raise OptionError(f"max_shard_bytes is {max_shard_bytes}")
    return [float(factor) for factor in factors]


def _check_places(base: Path, paths: Sequence[Path], out: Path) -> None:
    if not (out.name.endswith(INDEX) or out.suffix == ".safetensors"):
        raise OptionError(f"{out} has to be a .safetensors file or an index (*{INDEX})")
    if any(each.exists() and out.exists() and each.samefile(out) for each in (base, *paths)):
        raise OptionError(f"{out} is one of the files to merge: write the result beside it")


class _Merge:
    """One merge: first what each tensor of the result will be, then the tensors, one layer after the other."""

    def __init__(
        self, checkpoint: Checkpoint, stored: Sequence[StoredAdapter], prefix: str, form: str, *, keep: bool
    ) -> None:
        self.checkpoint, self.stored, self.prefix, self.form, self.keep = checkpoint, stored, prefix, form, keep
        self.rows: dict[str, MergeRow] = {}
        self.grown: dict[str, ConvGeometry] = {}
        self.carried = self._carried()
        self.layers, self.reasons = stored_layers(stored)
        self.owner = {
            self._key(name, part): layer for layer in self.layers for name in layer.names for part in ("weight", "bias")
        }
        self.ready: dict[str, dict[str, Tensor]] = {}

    def _key(self, module: str, name: str) -> str:
        """Return the base's key of a module's tensor."""
        return f"{self.prefix}{module}.{name}" if module else f"{self.prefix}{name}"

    def _carried(self) -> dict[str, tuple[StoredAdapter, Tensor]]:
        """Return the tensors that the adapters bring for the base's, by the base's key."""
        found: dict[str, tuple[StoredAdapter, Tensor]] = {}
        for each in self.stored:
            for module, name, tensor in each.changed():
                for one in (module, *(each.file.hosts or {}).get(module, {}).get("names", ())):
                    key = self._key(one, name)
                    if key not in self.checkpoint.tensors and one == module:
                        raise self._absent(key, each)
                    found[key] = (each, tensor)
        return {key: value for key, value in found.items() if key in self.checkpoint.tensors}

    def _absent(self, key: str, stored: StoredAdapter) -> AdapterFileError:
        end = key[len(self.prefix) :]
        longer = [each for each in self.checkpoint.tensors if each.endswith(f".{end}")]
        hint = f" It has {longer[0]}: prefix={longer[0][: -len(end)]!r} (--prefix)?" if longer else ""
        return AdapterFileError(
            f"{stored.path} does not fit {self.checkpoint.path}, which has no tensor {key!r}.{hint}"
        )

    def write(self, out: Path, max_shard_bytes: int, progress: Progress | None) -> FileMerge:
        """Write the result."""
        entries = {key: self._entry(key) for key in self.checkpoint.tensors}
        for layer in self.layers:  # a bias may come to a layer that had none
            weight = self._key(layer.target, "weight")
            if weight not in entries:
                raise self._absent(weight, layer.stored[0])
            for name in layer.names:
                weight = self._key(name, "weight")
                if weight in entries:
                    entry = (layer.geometry.out_channels,), entries[weight][1]
                    entries.setdefault(self._key(name, "bias"), entry)
        shards = self._shards(out, entries, max_shard_bytes)
        metadata = {"format": "pt", **self.checkpoint.metadata, METADATA: json.dumps(self._said())}
        total, done = sum(map(size_of, entries.values())), 0
        places: dict[str, str] = {}
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(tensor_file(path, {key: entries[key] for key in keys}, metadata))
                for path, keys in shards.items()
            }
            for path, keys in shards.items():
                for key in in_file_order({key: entries[key] for key in keys}):
                    if self._add(key, entries[key], files[path]):
                        places[key] = path.name
                    done += size_of(entries[key])
                    if progress is not None:
                        progress(done, total)
            self._raise()
            sizes = sum(file.size for file in files.values())
        written = list(shards)
        if out.name.endswith(INDEX):
            index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(places.items()))}
            write(out, (json.dumps(index, indent=2) + "\n").encode())
            written.append(out)
        rows = tuple(self.rows[layer.name] for layer in self.layers)
        plan = MergePlan(rows, tuple(each.file.name for each in self.stored))
        return FileMerge(out, plan, tuple(written), tuple(self.carried), self.grown)

    def _said(self) -> dict[str, Any]:
        return {
            "adapters": [
                {"name": each.file.name, "content": each.file.content, "coefficient": each.coefficient}
                for each in self.stored
            ],
            "form": self.form,
        }

    def _shards(self, out: Path, entries: Mapping[str, Entry], most: int) -> dict[Path, list[str]]:
        """Return the files to write, with the keys of each; a bias that is new lies with its layer's weight."""
        if not out.name.endswith(INDEX):
            return {out: list(entries)}
        groups: list[list[str]] = []
        if len(self.checkpoint.shards) > 1:
            groups = [list(keys) for keys in self.checkpoint.shards.values()]
        else:
            size = most + 1
            for key in self.checkpoint.tensors:
                size += size_of(entries[key])
                if size > most:
                    groups.append([])
                    size = size_of(entries[key])
                groups[-1].append(key)
        at = {key: group for group in groups for key in group}
        for key in entries.keys() - at.keys():
            at[f"{key.removesuffix('bias')}weight"].append(key)
        stem = out.name.removesuffix(INDEX)
        return {
            out.with_name(f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors"): keys for n, keys in enumerate(groups, 1)
        }

    def _entry(self, key: str) -> Entry:
        """Return shape and dtype of a tensor of the result, before its kernel grows."""
        shape, dtype = self.checkpoint.tensors[key]
        if key in self.carried:
            own = self.carried[key][1]
            return tuple(own.shape), NAMES[fitted_dtype(own.dtype, DTYPES[dtype], self.keep)]
        layer = self.owner.get(key)
        if layer is None or key.endswith(".weight"):
            return shape, dtype
        weight = f"{key.removesuffix('bias')}weight"
        return (shape, self._entry(weight)[1]) if weight in self.checkpoint.tensors else (shape, dtype)

    def _add(self, key: str, entry: Entry, file: TensorFile) -> bool:
        """Write one tensor of the result; return whether there is one. After a refusal the layers are only worked out."""
        layer = self.owner.get(key)
        if layer is not None:
            tensor = self._merged(key, layer)
            if tensor is not None and not self.reasons:
                file.add_tensor(key, tensor)
            return tensor is not None
        if self.reasons:
            return True
        if key in self.carried:
            file.add_tensor(key, self._shown(key))
        else:
            file.add(key, entry, self.checkpoint.chunks(key))
        return True

    def _shown(self, key: str) -> Tensor:
        """Return a tensor of the base as the adapters have it."""
        if key not in self.carried:
            return self.checkpoint.read(key)
        stored, tensor = self.carried[key]
        try:
            return fitted(tensor, DTYPES[self.checkpoint.tensors[key][1]], self.keep)
        except AdapterFileError as error:
            raise AdapterFileError(f"{stored.path}: {key} {error}") from None

    def _merged(self, key: str, layer: StoredLayer) -> Tensor | None:
        """Return the merged weight or bias of a layer; it is worked out once for all of its keys."""
        if layer.name not in self.ready:
            self.ready = {name: parts for name, parts in self.ready.items() if parts}
            parts = {} if layer.name in self.rows else self._worked_out(layer)
            keys = [(self._key(name, part), tensor) for name in layer.names for part, tensor in parts.items()]
            self.ready[layer.name] = {each: tensor for each, tensor in keys if self._is_there(each)}
        return self.ready[layer.name].pop(key, None)

    def _is_there(self, key: str) -> bool:
        """Return whether the result has a merged tensor of that key: a layer's second name may have none on disk."""
        return f"{key.rpartition('.')[0]}.weight".removeprefix(".") in self.checkpoint.tensors

    def _worked_out(self, layer: StoredLayer) -> dict[str, Tensor]:
        """Return the merged weight and bias of a layer; none where it cannot merge, and then ``reasons`` says why."""
        keys = self._key(layer.target, "weight"), self._key(layer.target, "bias")
        weight, geometry = self._shown(keys[0]), layer.geometry
        bias = self._shown(keys[1]) if keys[1] in self.checkpoint.tensors else None
        expected = geometry.as_weight(torch.empty(geometry.weight_shape(), device="meta")).shape
        if weight.shape != expected:
            raise AdapterFileError(
                f"{layer.stored[0].path} does not fit {self.checkpoint.path}: {keys[0]} is {tuple(weight.shape)}, and "
                f"{tuple(expected)} in the adapter file ({geometry})"
            )
        host = ConvKernel(geometry.as_kernel(exact(weight)), None if bias is None else exact(bias), geometry)
        adapters = tuple(each.adapter(layer.name, weight.dtype, keep=self.keep) for each in layer.stored)
        factors = tuple(each.coefficient for each in layer.stored)
        entry = layer.stored[0].file.layers[layer.name].output
        class_name = "Linear" if geometry.linear else "ConvTranspose2d" if geometry.transposed else "Conv2d"
        operands = Operands(layer.name, class_name, host, "", adapters, entry, factors)
        merged = self._allowed(solve_kernels(operands, self.form), layer)
        parts, merged = _cast(merged, geometry, weight.dtype)
        self.rows[layer.name] = MergeRow.of(operands, merged)
        if merged.form == "kept":
            self.reasons[layer.name] = merged.reason
        elif merged.kernel is not None and merged.kernel.geometry != geometry:
            self.grown[layer.target] = merged.kernel.geometry
        return parts

    def _allowed(self, merged: Merged, layer: StoredLayer) -> Merged:
        """Return a layer's form, or the layer kept where files cannot have that form."""
        if merged.form == "kept":
            return merged
        if merged.kernel is None:
            serves = merged.beside and merged.macs_single is not None
            instead = "form='single' (--form single) takes one larger kernel" if serves else WITH_MODEL
            return merged.kept(
                f"it merges with new modules ({merged.after}: {merged.reason}), which files have none of: {instead}"
            )
        if layer.reader is not None:
            return merged.kept(
                f"another module may read its weight ({layer.reader}): convpeft.merge(model, example_inputs=...) finds out by running"
            )
        return merged

    def _raise(self) -> None:
        if self.reasons:
            lines = "\n".join(f"  {name or '(root)'}: {reason}" for name, reason in self.reasons.items())
            count = len({*self.reasons, *(layer.name for layer in self.layers)})
            raise MergeError(
                f"{len(self.reasons)} of {count} layers cannot merge; nothing was written.\n{lines}", self.reasons
            )


def _cast(merged: Merged, before: ConvGeometry, dtype: torch.dtype) -> tuple[dict[str, Tensor], Merged]:
    """Return weight and bias in the base's dtype, the one rounding of a merge; none, with the reason, where that fails."""
    kernel = merged.kernel
    if merged.form == "kept" or kernel is None:
        return {}, merged
    try:
        if kernel.geometry != before:
            empty = before.build(torch.empty(before.weight_shape(), device="meta"), None)
            kernel.geometry.imprint(empty)
    except GeometryError as error:
        return {}, merged.kept(str(error))
    parts = {"weight": kernel.geometry.as_weight(kernel.weight).to(dtype)}
    if kernel.bias is not None:
        parts["bias"] = kernel.bias.to(dtype)
    if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
        return {}, merged.kept(f"its merged weights overflow {dtype}")
    return parts, merged
