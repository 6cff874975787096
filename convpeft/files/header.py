"""The header of an adapter file: what it says of itself, checked before anything is made from it."""

from __future__ import annotations

import hashlib
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..adapters.options import fits, hints_of
from ..convolution.geometry import LATER_FIELDS, ConvGeometry, output_geometry
from ..errors import AdapterFileError, ConvPeftError, SpecError
from ..hosts.records import LayerRecord
from ..planning.spec import NORMS, Spec
from .fingerprints import ALGORITHM

FORMAT, VERSION = "convpeft", 1
METADATA = "convpeft"  # key of the one text in a safetensors file's metadata
ADAPTER, OWN, STATE = (
    "adapter",
    "own",
    "state",
)  # what a tensor is of: an adapter, an unfrozen module, a frozen one that moved
_MOST_HEADER = 32 * 2**20  # bytes of safetensors header read at all; a real one has a few hundred kilobytes
_MOST_OPTION = 2**16  # an option that is a number or a list may be as large as this in any file, however small


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file says of itself, read without a model.

    Attributes:
        name: the adapter was saved under.
        spec: it came from, as plain data.
        layers: kind, place, options and geometry by module name.
        owned: modules whose own tensors are in the file, with relative learning rates.
        norm: the norm policy.
        base: digests of the base model's layers.
        parts: of layers with buffers, the digests of these and of the parameters, see ``fingerprints.parts``.
        tensors: shape and dtype by key.
        content: digest of all tensors.
    """

    name: str
    spec: dict[str, Any]
    layers: dict[str, LayerRecord]
    owned: dict[str, float]
    norm: str
    base: dict[str, str]
    parts: dict[str, dict[str, str]]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    content: str


def tensor_key(part: str, module: str, tensor: str) -> str:
    """Return the key of a tensor in a file.

    Args:
        part: ``ADAPTER``, ``OWN`` or ``STATE``.
        module: name of the adapted, unfrozen or other module.
        tensor: name of the tensor in the adapter or module.
    """
    return f"{part}:{module}:{tensor}"


def seal(metadata: dict[str, Any]) -> str:
    """Return the digest of everything the metadata says, but for the seal itself."""
    text = json.dumps({key: value for key, value in metadata.items() if key != "seal"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def parse(data: Any, tensors: dict[str, tuple[tuple[int, ...], str]], path: Path) -> AdapterFile:
    """Return the metadata of a file, already read from its JSON, as an ``AdapterFile``.

    Args:
        data: the parsed JSON; nothing about it is taken for granted.
        tensors: shape and dtype by key.
        path: of the file, for the errors.

    Raises:
        AdapterFileError: if it is of another format or version, was changed, or is not sound.
        KeyError, TypeError, ValueError, AttributeError: if it is not even built like metadata.
    """
    if data["format"] != FORMAT:
        raise AdapterFileError(f"{path}: format {data['format']!r} is not {FORMAT!r}")
    if type(data["version"]) is not int or data["version"] != VERSION:
        raise AdapterFileError(
            f"{path}: file version {data['version']!r}; this convpeft reads version {VERSION}. Update convpeft?"
        )
    if data["base"]["algorithm"] != ALGORITHM:
        raise AdapterFileError(f"{path}: unknown digest {data['base']['algorithm']!r}, not {ALGORITHM!r}")
    if data["seal"] != seal(data):
        raise AdapterFileError(f"{path}: its metadata is not what was saved (digest differs): take the original file")
    problems = list(_problems(data, sum(math.prod(shape) for shape, _ in tensors.values())))
    if problems:
        raise AdapterFileError(f"{path}: its metadata is not sound: {'; '.join(problems[:12])}")
    layers = {key: LayerRecord(**layer) for key, layer in data["layers"].items()}
    owned = {key: float(lr_mult) for key, lr_mult in data["owned"].items()}
    try:
        Spec.from_dict(data["spec"])
    except SpecError as error:
        raise AdapterFileError(f"{path}: its spec is not sound: {error}") from error
    base = data["base"]["layers"], data["base"].get("parts", {})
    return AdapterFile(data["name"], data["spec"], layers, owned, data["norm"], *base, tensors, data["content"])


def _problems(data: dict[str, Any], elements: int) -> Iterator[str]:
    """Yield what is of the wrong type or out of range in the metadata of a file with so many numbers in its tensors."""
    for key, kind in {"name": str, "content": str, "spec": dict, "layers": dict, "owned": dict}.items():
        if not isinstance(data[key], kind):
            yield f"{key} is {data[key]!r}"
    base = data["base"]["layers"]
    if not isinstance(base, dict) or not all(isinstance(value, str) for value in base.values()):
        yield "the base's digests are no texts by layer"
    parts = data["base"].get("parts", {})
    if not isinstance(parts, dict) or not all(
        isinstance(part, dict) and all(isinstance(value, str) for value in part.values()) for part in parts.values()
    ):
        yield "the digests of the base's buffers are no texts by layer and name"
    if data["norm"] not in NORMS:
        yield f"norm is {data['norm']!r}"
    layers, owned = (data[key] if isinstance(data[key], dict) else {} for key in ("layers", "owned"))
    if not layers and not owned:
        yield "it has neither adapted nor unfrozen layers, so it is no adapter"
    for key, lr_mult in owned.items():
        if not fits(lr_mult, float) or lr_mult < 0:
            yield f"unfrozen layer {key}: lr_mult is {lr_mult!r}"
    for key, layer in layers.items():
        for problem in _layer_problems(layer, max(elements, _MOST_OPTION)):
            yield f"layer {key}: {problem}"


def _layer_problems(layer: Any, most: int) -> Iterator[str]:
    hints = hints_of(LayerRecord)
    if not isinstance(layer, dict) or set(layer) != set(hints):
        yield "it is no layer record"
        return
    for key, hint in hints.items():
        kind = dict if typing.get_origin(hint) is dict else hint
        if not fits(layer[key], kind) or (key == "lr_mult" and layer[key] < 0):
            yield f"{key} is {layer[key]!r}"
    if layer["place"] not in ("parallel", "output"):
        yield f"place is {layer['place']!r}"
    for key, value in layer["options"].items() if isinstance(layer["options"], dict) else ():
        size = len(value) if isinstance(value, list) else value
        if isinstance(size, int) and size > most:
            yield f"option {key} of size {size:,} cannot be, the file is too small for it"
    yield from _geometry_problems(layer["geometry"], layer["place"])


def _geometry_problems(fields: Any, place: str) -> Iterator[str]:
    hints = hints_of(ConvGeometry)
    if not isinstance(fields, dict) or set(fields) | set(LATER_FIELDS) != set(hints):
        yield "its geometry is no geometry record"
        return
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    wrong = [key for key, value in values.items() if not fits(value, hints[key])]
    if wrong or min(values["in_channels"], values["out_channels"]) < 1:
        yield f"its geometry has {', '.join(f'{key} {values[key]!r}' for key in wrong or ('in_channels', 'out_channels'))}"
    elif place == "output" and ConvGeometry(**values) != output_geometry(values["out_channels"], values["linear"]):
        yield "its geometry is not that of a module's output"


def inspect_adapter(path: str | Path) -> AdapterFile:
    """Return what an adapter file says of itself; no tensor is read and no model is needed.

    Raises:
        AdapterFileError: if it is missing, truncated, no adapter file, or of an unknown version.
    """
    path = Path(path)
    header = _header(path)
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(METADATA)
            tensors = {key: (tuple(header[key]["shape"]), str(header[key]["dtype"])) for key in sorted(file.keys())}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is damaged or no safetensors file: {error}") from error
    if raw is None:
        raise AdapterFileError(
            f"{path} is a safetensors file, but not one convpeft wrote (it has no {METADATA!r} metadata)"
        )
    try:
        return parse(json.loads(raw), tensors, path)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ConvPeftError):
            raise
        raise AdapterFileError(f"{path}: its metadata is damaged ({type(error).__name__}: {error})") from error


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
