"""The header of an adapter file: what it says of itself, checked before anything is made from it."""

from __future__ import annotations

import hashlib
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..adapters.options import MOST, MOST_SIZES, fits, hints_of
from ..adapters.registry import file_refusal
from ..convolution.geometry import LATER_FIELDS, ConvGeometry, output_geometry
from ..errors import AdapterFileError, ConvPeftError, SpecError, brief, shown
from ..hosts.records import LayerRecord
from ..planning.parsing import strict_json
from ..planning.rules import RULE_KEYS, is_output, is_rate
from ..planning.spec import NORMS, Spec
from .fingerprints import ALGORITHM
from .host_notes import Note, note_problems
from .reading import Entry, OpenFile, opened, shapes_by_layer

FORMAT, VERSION = "convpeft", 1
METADATA = "convpeft"  # key of the one text in a safetensors file's metadata
# what a tensor is of: an adapter, an unfrozen module, or a frozen one whose buffers moved in training
ADAPTER, OWN, STATE = "adapter", "own", "state"
_MOST_NAMED = 12  # problems in one error
_LONGEST_NAME = 1000  # of an adapter


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
        hosts: notes on layers that are more than plain layers to a merge, see ``host_notes.notes_of``; None in files of
            earlier versions.
    """

    name: str
    spec: dict[str, Any]
    layers: dict[str, LayerRecord]
    owned: dict[str, float]
    norm: str
    base: dict[str, str]
    parts: dict[str, dict[str, str]]
    tensors: dict[str, Entry]
    content: str
    hosts: dict[str, Note] | None = None


def tensor_key(part: str, module: str, tensor: str) -> str:
    """Return the key of a tensor in a file.

    Args:
        part: ``ADAPTER``, ``OWN`` or ``STATE``.
        module: name of the adapted, unfrozen or other module.
        tensor: name of the tensor in the adapter or module.
    """
    return f"{part}:{module}:{tensor}"


def modules_of(tensors: Iterable[str], *parts: str) -> list[str]:
    """Return the modules that tensors of these parts are of, from the keys in a file, each once."""
    split = [key.split(":", 1) for key in tensors]
    return list(dict.fromkeys(rest.rpartition(":")[0] for part, rest in split if part in parts))


def seal(metadata: dict[str, Any]) -> str:
    """Return the digest of everything the metadata says, but for the seal itself."""
    text = json.dumps({key: value for key, value in metadata.items() if key != "seal"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def parse(data: Any, tensors: dict[str, Entry], path: Path) -> AdapterFile:
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
        raise AdapterFileError(f"{path}: format {shown(data['format'])} is not {FORMAT!r}")
    if type(data["version"]) is not int or data["version"] != VERSION:
        raise AdapterFileError(
            f"{path}: file version {shown(data['version'])}; this convpeft reads version {VERSION}. Update convpeft?"
        )
    if data["base"]["algorithm"] != ALGORITHM:
        raise AdapterFileError(f"{path}: unknown digest {shown(data['base']['algorithm'])}, not {ALGORITHM!r}")
    if data["seal"] != seal(data):
        raise AdapterFileError(f"{path}: its metadata is not what was saved (digest differs): take the original file")
    problems = list(islice(_problems(data, tensors), _MOST_NAMED))
    if problems:
        raise AdapterFileError(f"{path}: its metadata is not sound: {'; '.join(problems)}")
    layers = {key: LayerRecord(**layer) for key, layer in data["layers"].items()}
    owned = {key: float(lr_mult) for key, lr_mult in data["owned"].items()}
    try:
        Spec.from_dict(data["spec"])
    except SpecError as error:
        raise AdapterFileError(f"{path}: its spec is not sound: {error}") from error
    base = data["base"]["layers"], data["base"].get("parts", {})
    said = data["name"], data["spec"], layers, owned, data["norm"]
    return AdapterFile(*said, *base, tensors, data["content"], data.get("hosts"))


def _problems(data: dict[str, Any], tensors: Mapping[str, Entry]) -> Iterator[str]:
    """Yield what is of the wrong type, out of range, or no file's business in the metadata of a file."""
    for key, kind in {"name": str, "content": str, "spec": dict, "layers": dict, "owned": dict}.items():
        if not isinstance(data[key], kind) or (key == "name" and len(data[key]) > _LONGEST_NAME):
            yield f"{key} is {shown(data[key])}"
    base = data["base"]["layers"]
    if not isinstance(base, dict) or not all(isinstance(value, str) for value in base.values()):
        yield "the base's digests are no texts by layer"
    parts = data["base"].get("parts", {})
    if not isinstance(parts, dict) or not all(
        isinstance(part, dict) and all(isinstance(value, str) for value in part.values()) for part in parts.values()
    ):
        yield "the digests of the base's buffers are no texts by layer and name"
    if not isinstance(data["norm"], str) or data["norm"] not in NORMS:
        yield f"norm is {shown(data['norm'])}"
    layers, owned = (data[key] if isinstance(data[key], dict) else {} for key in ("layers", "owned"))
    if not layers and not owned:
        yield "it has neither adapted nor unfrozen layers, so it is no adapter"
    for key, lr_mult in owned.items():
        if not is_rate(lr_mult):
            yield f"unfrozen layer {brief(key)}: lr_mult is {shown(lr_mult)}"
    shapes = shapes_by_layer(tensors, ADAPTER)
    elements = sum(math.prod(shape) for shape, _ in tensors.values())
    for key, layer in layers.items():
        for problem in _layer_problems(layer, shapes.get(key, []), max(elements, MOST)):
            yield f"layer {brief(key)}: {problem}"
    if "hosts" in data:
        yield from note_problems(data["hosts"], _geometry_problems)
    rules = data["spec"].get("rules") if isinstance(data["spec"], dict) else None
    for rule in rules if isinstance(rules, list) else ():
        if isinstance(rule, dict) and isinstance(rule.get("kind"), str):
            options = {key: value for key, value in rule.items() if key not in RULE_KEYS}
            refusal = file_refusal(rule["kind"], options, MOST)
            if refusal:
                yield f"its spec: {refusal}"


def _layer_problems(layer: Any, shapes: Sequence[tuple[int, ...]], most: int) -> Iterator[str]:
    """Yield what is wrong with the record of a layer.

    Args:
        layer: its record.
        shapes: of the tensors that the file brings for it.
        most: an option that is a number may be as large as this.
    """
    hints = hints_of(LayerRecord)
    if isinstance(layer, dict):
        layer = {"up_mult": None, **layer}  # files before 0.2 have none
    if not isinstance(layer, dict) or set(layer) != set(hints):
        yield "it is no layer record"
        return
    ranges = {
        "lr_mult": is_rate,
        "up_mult": lambda value: value is None or is_rate(value),
        "output": lambda value: value is None or is_output(value),
        "rule": _is_number,
    }
    wrong = [
        key for key, hint in hints.items() if not fits(layer[key], dict if typing.get_origin(hint) is dict else hint)
    ]
    wrong += [key for key, is_in_range in ranges.items() if key not in wrong and not is_in_range(layer[key])]
    if wrong:
        yield ", ".join(f"{key} is {shown(layer[key])}" for key in wrong)
        return
    if layer["place"] not in ("parallel", "output"):
        yield f"place is {shown(layer['place'])}"
    for key, value in layer["options"].items():
        size, allowed = (len(value), max(MOST_SIZES, len(shapes))) if isinstance(value, list) else (value, most)
        if isinstance(size, int) and size > allowed:
            yield f"option {brief(key)} of size {size:,} cannot be, the file is too small for it"
    unsound = list(_geometry_problems(layer["geometry"], layer["place"]))
    yield from unsound
    refusal = None if unsound else file_refusal(layer["kind"], layer["options"], _largest(shapes, layer["geometry"]))
    if refusal:
        yield refusal


def _geometry_problems(fields: Any, place: str) -> Iterator[str]:
    hints = hints_of(ConvGeometry)
    if not isinstance(fields, dict) or set(fields) | set(LATER_FIELDS) != set(hints):
        yield "its geometry is no geometry record"
        return
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    wrong = [key for key, value in values.items() if not fits(value, hints[key]) or not _is_bounded(value)]
    if wrong or min(values["in_channels"], values["out_channels"]) < 1:
        yield f"its geometry has {', '.join(f'{key} {shown(values[key])}' for key in wrong or ('in_channels', 'out_channels'))}"
    elif place == "output" and ConvGeometry(**values) != output_geometry(values["out_channels"], values["linear"]):
        yield "its geometry is not that of a module's output"


def _is_number(value: Any) -> bool:
    return 0 <= value < 2**31


def _is_bounded(value: Any) -> bool:
    """Return whether the numbers in a field of a geometry are such as layers have."""
    numbers = value if isinstance(value, tuple) else (value,)
    return all(not isinstance(number, int) or abs(number) < 2**31 for number in numbers)


def _largest(shapes: Sequence[tuple[int, ...]], geometry: dict[str, Any]) -> int:
    """Return the largest size, a rank say, that the tensors of a layer can have been made with.

    It is one of their dimensions, and the elements are at least as many as it times the channels of one side.
    """
    elements = sum(math.prod(shape) for shape in shapes)
    largest = max((size for shape in shapes for size in shape), default=0)
    return min(largest, 2 * elements // min(geometry["in_channels"], geometry["out_channels"]))


def inspect_adapter(path: str | Path) -> AdapterFile:
    """Return what an adapter file says of itself; no tensor is read and no model is needed.

    Raises:
        AdapterFileError: if it is missing, truncated, no adapter file, or of an unknown version.
    """
    with opened(Path(path)) as file:
        return described(file)


def described(file: OpenFile) -> AdapterFile:
    """Return what an open adapter file says of itself; see ``inspect_adapter``."""
    raw, path = file.metadata.get(METADATA), file.path
    if raw is None:
        raise AdapterFileError(
            f"{path} is a safetensors file, but not one convpeft wrote (it has no {METADATA!r} metadata)"
        )
    try:
        return parse(strict_json(raw), file.tensors, path)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ConvPeftError):
            raise
        raise AdapterFileError(
            f"{path}: its metadata is damaged ({type(error).__name__}: {brief(str(error))})"
        ) from error
