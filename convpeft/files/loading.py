"""Load an adapter file: what it says becomes planned layers, which go the way of every ``inject``; all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import Site
from ..adapters.options import AdapterOptions, read_options
from ..adapters.registry import adapter_class, make_adapter
from ..convolution.geometry import ConvGeometry
from ..convolution.precision import floating_dtype
from ..errors import AdapterFileError, BaseMismatch, OptionError, SpecError, brief, shortened
from ..hosts.buffers import saved_buffers
from ..hosts.model import whole
from ..hosts.modules import base_modules, unique_modules
from ..hosts.records import AdapterRecord
from ..hosts.slots import BASE, base_class
from ..hosts.trainers import guard_trainers
from ..hosts.transaction import with_normal_tensors
from ..hosts.unfrozen import tensors_of
from ..hosts.wrappers import refuse_parallel
from ..injection.install import Built, build, check_name, install
from ..planning.bypasses import bypassed
from ..planning.plan import PlannedLayer
from ..planning.sites import Sites, Wanted, half_shared, lazy_modules
from .dtypes import fitted, mixed_dtypes, norms_of
from .fingerprints import differing, digest, hashing
from .header import ADAPTER, OWN, STATE, AdapterFile, described, tensor_key
from .reading import DTYPES, OpenFile, opened

_MOST_NAMED = 12  # problems in one error


@with_normal_tensors
def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    any_base: bool = False,
    lean: bool = True,
    dtype: torch.dtype | str | None = None,
) -> AdapterFile:
    """Put the adapter of a file into the model in place, make it the active one, and return what the file says.

    All or nothing: the file's structure, everything that ``plan`` would refuse on this model, the base's digests, every
    shape, and the digest of the tensors are checked before the first change.

    Args:
        model: the base the adapter was trained on, with or without other adapters.
        path: of the file.
        name: to give it here; unset, the one it was saved under.
        any_base: accept a base with other weights (the layers' shapes must fit all the same).
        lean: see ``inject``.
        dtype: of the adapters' parameters, see ``inject``; unset, that of the file, or that of the layers with ``any_base``
            and where the file's base was a cast of this one.

    Raises:
        AdapterFileError: if the file is damaged or does not fit; the text says which layers.
        BaseMismatch: if the base has other weights; its ``layers`` are exactly those that differ.
        StateError: if the name is taken.
    """
    path, root, wanted = Path(path), whole(model), floating_dtype(dtype)
    refuse_parallel(root)
    guard_trainers(map(type, root.modules()))
    with opened(path) as source:
        file = described(source)
        name = file.name if name is None else name
        check_name(root, name)
        modules = dict(base_modules(root))
        with nullcontext(dict) if any_base else hashing(root) as base:  # in other threads, while this one checks
            sites = _sites(root, modules, file, path, trusting=not any_base)
            try:
                _check_tensors(modules, sites, file, path)
                tensors = read_tensors(source, file)
                _check_dtypes(modules, sites, file, path)
            except AdapterFileError:
                if not any_base:
                    _check_base(root, base(), file, path)  # another base says more than what follows from it
                raise
            same_dtype = not any_base and _check_base(root, base(), file, path)
    built = _built(modules, sites.layers, file, tensors, path, keep_dtype=same_dtype, dtype=wanted)
    install(root, name, AdapterRecord(file.spec, file.layers, file.owned, file.norm), built, lean=lean)
    return file


def _sites(
    root: nn.Module, modules: Mapping[str, nn.Module], file: AdapterFile, path: Path, *, trusting: bool
) -> Sites:
    """Return the planned layers of a file, or raise an AdapterFileError that lists why the file does not fit this model."""
    unique = dict(unique_modules(root))
    problems = [f"{key}: not in this model" for key in [*file.layers, *file.owned] if key not in modules]
    problems += filter(None, [lazy_modules(unique)])
    problems += [*_doubles(modules, file.layers), *_doubles(modules, file.owned)]
    wanted = list(_wanted(modules, file, problems))
    sites = Sites(root, wanted, bypassed(unique.values()), trusting=trusting)
    problems += sites.problems + half_shared(unique, {key: modules[key] for key in file.owned if key in modules})
    if problems:
        raise AdapterFileError(
            f"{path} does not fit this {base_class(root).__name__}; the model is unchanged. {'; '.join(map(brief, problems[:_MOST_NAMED]))}"
        )
    return sites


def _wanted(modules: Mapping[str, nn.Module], file: AdapterFile, problems: list[str]) -> Iterator[Wanted]:
    """Yield the adapters of a file whose module is there; ``problems`` takes what is wrong with the others."""
    for name, record in file.layers.items():
        module = modules.get(name)
        if module is None:
            continue
        try:
            options, found = read_options(record.kind, adapter_class(record.kind).Options, record.options)
        except SpecError as error:  # no such kind here
            options, found = None, [error]  # type: ignore[list-item]
        geometry = ConvGeometry.from_dict(record.geometry)
        place: Any = record.place
        if options is not None and adapter_class(record.kind).tries_itself:
            unlike = unlike_its_tensors(file, name, Site(place, geometry), options)
            if unlike is not None:
                found, options = [OptionError(unlike)], None
        problems += [f"{name}: {problem}" for problem in found]
        if options is not None:
            numbers = (record.rule, record.lr_mult, record.output)
            yield Wanted(name, module, "", record.kind, place, options, *numbers, None, geometry, record.up_mult)


def unlike_its_tensors(file: AdapterFile, name: str, site: Site, options: AdapterOptions) -> str | None:
    """Return how the tensors of a file differ from those of the adapter it asks for, by their shapes, or None.

    For kinds that try themselves: what they would try is as large as what the file brings, or is not tried.
    """
    kind = file.layers[name].kind
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draft = make_adapter(kind, site, options, "meta")
    except Exception:  # the reason is found, and said, when it is tried
        return None
    for key, tensor in draft.state_dict().items():
        shape, _ = file.tensors.get(tensor_key(ADAPTER, name, key), (None, ""))
        if shape != tuple(tensor.shape):
            there = "missing" if shape is None else f"{shape} in the file"
            return f"{tensor_key(ADAPTER, name, key)} is {there}; kind {kind!r} with these options makes {tuple(tensor.shape)}"
    return None


def _doubles(modules: Mapping[str, nn.Module], names: Iterable[str]) -> Iterator[str]:
    """Yield a problem for each name in a file that means the same module here as an earlier one."""
    first: dict[int, str] = {}
    for name in names:
        if name in modules and first.setdefault(id(modules[name]), name) != name:
            yield f"{name}: the same module as {first[id(modules[name])]} here, and another one in the file"


def _check_base(root: nn.Module, here: dict[str, str], file: AdapterFile, path: Path) -> bool:
    """Raise a BaseMismatch if the file was made on another base; return whether the base has its dtype here, too."""
    differ, count, cast = differing(root, here, file.base, file.parts)
    if differ:
        raise BaseMismatch(
            f"{path} was made on another base: {len(differ)} of {count} layers differ ({shortened(differ)}); the model is "
            "unchanged. Load the base's own checkpoint first; any_base=True takes the adapter as it is.",
            differ,
        )
    return cast is None


def _check_tensors(modules: Mapping[str, nn.Module], sites: Sites, file: AdapterFile, path: Path) -> None:
    """Raise an AdapterFileError for a file whose tensors are not exactly those that its layers need."""
    wanted: dict[str, Tensor] = {}
    for layer in sites.layers:
        draft = sites.draft(layer.kind, layer.site, layer.options)
        wanted.update({tensor_key(ADAPTER, layer.name, key): tensor for key, tensor in draft.state_dict().items()})
    for name in file.owned:
        own = tensors_of(modules[name], BASE)
        wanted.update({tensor_key(OWN, name, key): tensor for key, tensor in own.items()})
    moved = {key: tensor for key, (_, _, tensor) in _moved(modules, file).items()}
    wanted.update(moved)
    problems = [f"{key} is missing" for key in wanted if key not in file.tensors]
    problems += [f"{brief(key)} is not expected" for key in file.tensors if key not in wanted]
    for key in wanted.keys() & file.tensors.keys():
        (shape, saved), here = file.tensors[key], wanted[key]
        if shape != tuple(here.shape) and key not in moved:  # a bank may have grown
            problems.append(f"{key} is {shape} in the file, {tuple(here.shape)} here")
        dtype = DTYPES.get(saved)
        if dtype is None or (dtype != here.dtype and not (dtype.is_floating_point and here.is_floating_point())):
            problems.append(f"{key} has dtype {saved} in the file, {str(here.dtype).removeprefix('torch.')} here")
    _raise(problems, path)


def _check_dtypes(modules: Mapping[str, nn.Module], sites: Sites, file: AdapterFile, path: Path) -> None:
    """Raise an AdapterFileError for a file with tensors that would not work beside one another."""
    if len({saved for _, saved in file.tensors.values() if DTYPES[saved].is_floating_point}) < 2 and not _has_tried(
        sites
    ):
        return
    problems: list[str] = []
    for layer in sites.layers:
        draft = sites.draft(layer.kind, layer.site, layer.options)
        own = {tensor_key(ADAPTER, layer.name, key): tensor for key, tensor in draft.state_dict().items()}
        problems += mixed_dtypes(own, file.tensors, norms_of(draft, layer.name))
        weight = getattr(modules[layer.name], "weight", None)
        if draft.tries_itself and isinstance(weight, Tensor) and weight.dtype != torch.float64:
            wide = [key for key in own if file.tensors[key][1] == "F64"]
            problems += [f"{key} is float64 in the file, and changes a weight that is not" for key in wide]
    for name in file.owned:
        own = {tensor_key(OWN, name, key): tensor for key, tensor in tensors_of(modules[name], BASE).items()}
        problems += mixed_dtypes(own, file.tensors, {})
    _raise(problems, path)


def _has_tried(sites: Sites) -> bool:
    return any(adapter_class(layer.kind).tries_itself for layer in sites.layers)


def _raise(problems: list[str], path: Path) -> None:
    """Raise an AdapterFileError that names the tensors that do not fit, if there are any."""
    if problems:
        raise AdapterFileError(
            f"{path}: {len(problems)} tensors do not fit; the model is unchanged. "
            f"{'; '.join(map(brief, problems[:_MOST_NAMED]))}"
        )


def _moved(modules: Mapping[str, nn.Module], file: AdapterFile) -> dict[str, tuple[str, str, Tensor]]:
    """Return, for each buffer in the file that training moved, its module, its name, and what the base has, by its key."""
    if not any(key.startswith(f"{STATE}:") for key in file.tensors):
        return {}
    found = {
        tensor_key(STATE, name, key): (name, key, tensor)
        for name, module in modules.items()
        for key, tensor in saved_buffers(module).items()
    }
    return {key: place for key, place in found.items() if key in file.tensors}


def _built(
    modules: Mapping[str, nn.Module],
    layers: list[PlannedLayer],
    file: AdapterFile,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    keep_dtype: bool,
    dtype: torch.dtype | None,
) -> Built:
    """Return what is to be installed, with the file's tensors.

    On the very base they keep their dtype, unless the model's holds all of its numbers and more: then nothing is lost
    by the model's, and the layers run. On another base, or on this one in another dtype, they get the model's. ``dtype``
    is that of the adapters in either case, if it is given.
    """

    def saved(key: str, old: Tensor, keep: bool = keep_dtype) -> Tensor:
        try:
            return fitted(tensors[key], old.dtype, keep).to(old.device)
        except AdapterFileError as error:
            raise AdapterFileError(f"{path}: {key} {error}; the model is unchanged") from None

    with torch.random.fork_rng(devices=[]):
        built = build(modules, layers, file.owned, lambda name, key, old: saved(tensor_key(OWN, name, key), old), dtype)
    for key, (name, buffer, old) in _moved(modules, file).items():
        built.buffers.setdefault(name, {})[buffer] = saved(key, old)
    for name, adapter in built.adapters.items():
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            tensor.data = saved(tensor_key(ADAPTER, name, key), tensor, keep_dtype and dtype is None)
    return built


def read_tensors(source: OpenFile, file: AdapterFile) -> dict[str, Tensor]:
    """Return the tensors of an open file.

    Raises:
        AdapterFileError: if they are not those that were saved.
    """
    tensors = source.read()
    if digest(tensors.items()) != file.content:
        raise AdapterFileError(
            f"{source.path}: its tensors are not the ones that were saved (digest differs); the model is unchanged"
        )
    return tensors
