"""Adapter files: one safetensors file with tensors and one JSON text; no pickle, ever.

Written atomically, read all or nothing, and refused by name when anything is off: see ``load_adapter``.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from . import hosting
from .adapters.base import Adapter, Site, read_options
from .choosing import bypassed
from .errors import AdapterFileError, BaseMismatch, ConvPeftError, StateError, shortened
from .exchanging import check_held
from .filling import furnish, furnished_drawer, source_of
from .fingerprints import ALGORITHM, digest, fingerprint, plain
from .geometry import PLAIN_HOSTS, ConvGeometry
from .injection import Built, _check_name, install
from .metadata import FORMAT, VERSION, AdapterFile, parse, seal
from .probing import known_channels, probe_outputs
from .registry import adapter_class
from .state import AdapterRecord, adapter_at, module_at, record_of, require_state, unwrapped

_KEY = "convpeft"
_MOST_HEADER = 32 * 2**20  # bytes of safetensors header read at all; a real one has a few hundred kilobytes
_ADAPTER, _OWN = "adapter", "own"


def save_adapter(model: nn.Module, path: str | Path, *, name: str | None = None) -> Path:
    """Write one adapter, with every tensor it unfroze, to a safetensors file, and return the path.

    The file is written beside its final place and then moved there in one step: a crash leaves the old file. Of a model
    that FSDP2 shards, all processes have to call this together.

    Args:
        model: an injected model.
        path: of the file; its folder is made if need be.
        name: of the adapter; unset, the only one, or the only active one.

    Raises:
        StateError: if nothing is injected, it is not clear which adapter is meant, or a tensor of it is gone.
        AdapterFileError: if the file cannot be written.
    """
    root, state = require_state(model)
    if name is None:
        names = list(state.adapters) if len(state.adapters) == 1 else list(state.active)
        if len(names) != 1:
            raise StateError(f"which adapter? Say name=..., one of: {', '.join(state.adapters)}")
        name = names[0]
    record = record_of(state, name)
    folded = [key for key in record.layers if adapter_at(root, key, name).is_folded]
    if folded:
        raise StateError(
            f"adapter {name!r} was folded for deployment by merge(strict=False) on {shortened(folded)}, and a folded adapter "
            "has no file form. Save it from the model that was merged, or this model whole with torch.save."
        )
    check_held(root, dict.fromkeys(record.owned, None))
    tensors = {key: plain(tensor) for key, tensor in _tensors(root, name, record).items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "spec": record.spec,
        "layers": {key: asdict(layer) for key, layer in record.layers.items()},
        "owned": record.owned,
        "norm": record.norm,
        "base": {"algorithm": ALGORITHM, "layers": fingerprint(root)},
        "content": digest(sorted(tensors.items())),
        "torch": torch.__version__.split("+")[0],
    }
    text = json.dumps({**metadata, "seal": seal(json.loads(json.dumps(metadata)))})
    path = Path(path)
    _write(path, safetensors_bytes({key: tensor.clone() for key, tensor in tensors.items()}, {_KEY: text}))
    return path


def inspect_adapter(path: str | Path) -> AdapterFile:
    """Return what an adapter file says of itself; no tensor is read and no model is needed.

    Raises:
        AdapterFileError: if it is missing, truncated, no adapter file, or of an unknown version.
    """
    path = Path(path)
    header = _header(path)
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(_KEY)
            tensors = {key: (tuple(header[key]["shape"]), str(header[key]["dtype"])) for key in sorted(file.keys())}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}") from error
    if raw is None:
        raise AdapterFileError(
            f"{path} is a safetensors file, but not one convpeft wrote (it has no {_KEY!r} metadata)"
        )
    try:
        return parse(json.loads(raw), tensors, path)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ConvPeftError):
            raise
        raise AdapterFileError(f"{path}: its metadata is damaged ({type(error).__name__}: {error})") from error


def load_adapter(
    model: nn.Module, path: str | Path, *, name: str | None = None, any_base: bool = False, lean: bool = True
) -> AdapterFile:
    """Put the adapter of a file into the model in place, make it the active one, and return what the file says.

    All or nothing: the file's structure, its fit to this model, the base's digests, every shape, and the digest of the
    tensors are checked before the first change.

    Args:
        model: the base the adapter was trained on, with or without other adapters.
        path: of the file.
        name: to give it here; unset, the one it was saved under.
        any_base: accept a base with other weights (the layers' shapes must fit all the same).
        lean: see ``inject``.

    Raises:
        AdapterFileError: if the file is damaged or does not fit; the text says which layers.
        BaseMismatch: if the base has other weights; its ``layers`` are exactly those that differ.
        StateError: if the name is taken.
    """
    path, root = Path(path), unwrapped(model)
    file = inspect_adapter(path)
    name = file.name if name is None else name
    _check_name(root, name)
    _check_layers(root, file, path, probing=any_base)
    if not any_base:
        _check_base(root, file, path)
    drafts = {key: _adapter(root, file, key, path, torch.device("meta")) for key in file.layers}
    _check_shapes(root, file, drafts, path)
    built = _built(root, file, drafts, path, keep_dtype=not any_base)
    install(root, name, AdapterRecord(file.spec, file.layers, file.owned, file.norm), built, lean=lean)
    return file


def _key(part: str, layer: str, tensor: str) -> str:
    return f"{part}:{layer}:{tensor}"


def _tensors(root: nn.Module, name: str, record: AdapterRecord) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer in record.layers:
        for key, tensor in adapter_at(root, layer, name).state_dict().items():
            found[_key(_ADAPTER, layer, key)] = tensor
    for layer in record.owned:
        for key, tensor in hosting.shown_tensors(module_at(root, layer), name).items():
            found[_key(_OWN, layer, key)] = tensor
    return found


def _write(path: Path, content: bytes) -> None:
    """Write bytes beside the path, flush them to the disk, and move them there in one step."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as file:
            temporary = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be written: {error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _header(path: Path) -> dict[str, Any]:
    """Return the safetensors header, its size bounded before anything is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MOST_HEADER, size - 8):
                raise AdapterFileError(
                    f"{path} is truncated or no safetensors file ({size:,} bytes, header said to be {length:,})"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # no text, no JSON, or a number of thousands of digits
        raise AdapterFileError(f"{path} is damaged or no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path} is no safetensors file: its header is a {type(header).__name__}")
    return header


def _check_layers(root: nn.Module, file: AdapterFile, path: Path, probing: bool) -> None:
    """Refuse a model that lacks a layer, or has another geometry there (``probing``: run a copy where only that tells)."""
    modules = dict(hosting.base_modules(root))
    problems = [f"{key}: not in this model" for key in [*file.layers, *file.owned] if key not in modules]
    unsure: list[str] = []
    past = bypassed(modules.values())
    problems += [f"{key}: {past[id(modules[key])]}" for key in file.layers if id(modules.get(key)) in past]
    for key in file.layers.keys() & modules.keys():
        record, module = file.layers[key], modules[key]
        saved = ConvGeometry.from_dict(record.geometry)
        shape = known_channels(module) if record.output is None else None
        if record.place == "parallel":
            here = ConvGeometry.of(module) if isinstance(module, PLAIN_HOSTS) else None
            if here != saved:
                problems.append(f"{key}: {here or type(module).__name__} here, {saved} in the file")
        elif shape is None:
            unsure.append(key)
        elif (shape.channels, shape.channels_last) != (saved.out_channels, saved.linear):
            problems.append(f"{key}: {shape.channels} output channels here, {saved.out_channels} in the file")
    if probing and unsure:
        shapes = probe_outputs(root, unsure, {key: file.layers[key].output for key in unsure}, None)
        for key, shape in shapes.items():
            saved = ConvGeometry.from_dict(file.layers[key].geometry)
            if (shape.channels, shape.channels_last) != (saved.out_channels, saved.linear):
                problems.append(f"{key}: {shape.channels} output channels here, {saved.out_channels} in the file")
    if problems:
        raise AdapterFileError(
            f"{path} does not fit this {hosting.base_class(root).__name__}; the model is unchanged. {'; '.join(problems[:12])}"
        )


def _check_base(root: nn.Module, file: AdapterFile, path: Path) -> None:
    here = fingerprint(root)
    differ = [key for key in {**file.base, **here} if file.base.get(key) != here.get(key)]
    if differ:
        raise BaseMismatch(
            f"{path} was made on another base: {len(differ)} of {len(here)} layers differ ({shortened(differ)}); the model is "
            "unchanged. Load the base's own checkpoint first; any_base=True takes the adapter as it is.",
            differ,
        )


def _adapter(root: nn.Module, file: AdapterFile, key: str, path: Path, device: torch.device) -> Adapter:
    """Make one of the file's adapters; on the meta device to learn its shapes without memory."""
    record, host = file.layers[key], module_at(root, key)
    try:
        kind = adapter_class(record.kind)
        if record.place not in kind.places:
            raise AdapterFileError(f"kind {record.kind!r} has no place {record.place!r}")
        if record.place == "parallel" and not isinstance(host, kind.hosts):
            raise AdapterFileError(f"kind {record.kind!r} serves no {hosting.base_class(host).__name__}")
        options, problems = read_options(kind, record.options)
        if problems:
            raise problems[0]
        site = Site(record.place, ConvGeometry.from_dict(record.geometry))  # type: ignore[arg-type]
        assert options is not None
        refusal = kind.refuses(site, options)
        if refusal:
            raise AdapterFileError(refusal)
        with torch.device(device):
            adapter = kind(site, options)
    except Exception as error:  # a kind from outside may raise anything
        raise AdapterFileError(f"{path}: layer {key}: {error}") from error
    _, dtype = hosting.device_and_dtype([host, root])
    return adapter.to(dtype=dtype).train(hosting.wants_training(host))


def _built(root: nn.Module, file: AdapterFile, drafts: dict[str, Adapter], path: Path, *, keep_dtype: bool) -> Built:
    """Return what is to be installed, with the file's tensors: in their dtype on the very base, else in that of the model."""
    tensors, adapters, drawers = _read(path, file), {}, {}
    with torch.random.fork_rng(devices=[]):
        for key, draft in drafts.items():
            device, _ = hosting.device_and_dtype([module_at(root, key), root])
            source = source_of(tensors, _key(_ADAPTER, key, ""), str(path), keep_dtype=keep_dtype)
            adapters[key] = furnish(draft, partial(_adapter, root, file, key, path, device), source, device)
    copies: dict[int, Tensor] = {}
    for key in file.owned:
        source = source_of(tensors, _key(_OWN, key, ""), str(path), keep_dtype=keep_dtype)
        drawers[key] = furnished_drawer(hosting.shown_tensors(module_at(root, key), hosting.BASE), source, copies)
    return Built(adapters, drawers)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _check_shapes(root: nn.Module, file: AdapterFile, drafts: dict[str, Adapter], path: Path) -> None:
    """Refuse a file whose tensors are not exactly those its layers need."""
    wanted: dict[str, Tensor] = {}
    for layer, draft in drafts.items():
        wanted.update({_key(_ADAPTER, layer, key): tensor for key, tensor in draft.state_dict().items()})
    for layer in file.owned:
        own = hosting.shown_tensors(module_at(root, layer), hosting.BASE)
        wanted.update({_key(_OWN, layer, key): tensor for key, tensor in own.items()})
    problems = [f"{key} is missing" for key in wanted if key not in file.tensors]
    problems += [f"{key} is not expected" for key in file.tensors if key not in wanted]
    for key in wanted.keys() & file.tensors.keys():
        (shape, saved), here = file.tensors[key], wanted[key]
        if shape != tuple(here.shape):
            problems.append(f"{key} is {shape} in the file, {tuple(here.shape)} here")
        dtype = _DTYPES.get(saved)
        if dtype is None or (dtype != here.dtype and not (dtype.is_floating_point and here.is_floating_point())):
            problems.append(f"{key} has dtype {saved} in the file, {str(here.dtype).removeprefix('torch.')} here")
    if problems:
        raise AdapterFileError(
            f"{path}: {len(problems)} tensors do not fit; the model is unchanged. {'; '.join(problems[:12])}"
        )


def _read(path: Path, file: AdapterFile) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in file.tensors}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}") from error
    if digest(sorted(tensors.items())) != file.content:
        raise AdapterFileError(
            f"{path}: its tensors are not the ones that were saved (digest differs); the model is unchanged"
        )
    return tensors
