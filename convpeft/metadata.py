"""What an adapter file says of itself, and the checks that this makes sense, before anything is made from it."""

from __future__ import annotations

import hashlib
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters.base import fits, hints_of
from .errors import AdapterFileError, SpecError
from .fingerprints import ALGORITHM
from .geometry import LATER_FIELDS, ConvGeometry, output_geometry
from .spec import NORMS, Spec
from .state import LayerRecord

FORMAT, VERSION = "convpeft", 1
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
        tensors: shape and dtype by key.
        content: digest of all tensors.
    """

    name: str
    spec: dict[str, Any]
    layers: dict[str, LayerRecord]
    owned: dict[str, float]
    norm: str
    base: dict[str, str]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    content: str


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
    return AdapterFile(
        data["name"], data["spec"], layers, owned, data["norm"], data["base"]["layers"], tensors, data["content"]
    )


def _problems(data: dict[str, Any], elements: int) -> Iterator[str]:
    """Yield what is of the wrong type or out of range in the metadata of a file with so many numbers in its tensors."""
    for key, kind in {"name": str, "content": str, "spec": dict, "layers": dict, "owned": dict}.items():
        if not isinstance(data[key], kind):
            yield f"{key} is {data[key]!r}"
    base = data["base"]["layers"]
    if not isinstance(base, dict) or not all(isinstance(value, str) for value in base.values()):
        yield "the base's digests are no texts by layer"
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
