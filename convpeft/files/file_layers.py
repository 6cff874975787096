"""The layers that a merge of files changes: what ``merge`` finds in a model, from what the files note of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters.registry import adapter_class
from ..convolution.geometry import ConvGeometry
from ..errors import AdapterFileError, UnknownKind
from .header import AdapterFile
from .stored import StoredAdapter

WITH_MODEL = "merge with the model in hand: convpeft.merge(model)"


@dataclass(frozen=True)
class StoredLayer:
    """One layer that files have adapters on, and the module that takes the merged result.

    Attributes:
        name: of the adapted module.
        target: name of the module that takes the result.
        geometry: of that module.
        names: all names of that module.
        stored: the files that have an adapter here.
        reader: another module that may read the weight, in words.
    """

    name: str
    target: str
    geometry: ConvGeometry
    names: tuple[str, ...]
    stored: tuple[StoredAdapter, ...]
    reader: str | None


def stored_layers(stored: Sequence[StoredAdapter]) -> tuple[list[StoredLayer], dict[str, str]]:
    """Return the layers to merge, in order, and by name the reasons why others cannot merge.

    Raises:
        AdapterFileError: if two files disagree on what a layer is.
    """
    on: dict[str, list[StoredAdapter]] = {}
    for each in stored:
        for key in each.file.layers:
            on.setdefault(key, []).append(each)
    layers: list[StoredLayer] = []
    reasons: dict[str, str] = {}
    taken: set[str] = set()
    for name, here in on.items():
        notes = [(each.file.hosts or {}).get(name, {}) for each in here]
        reason = _class_refusal(name, here, notes)
        if reason is None:
            layer = _layer(name, here, notes)
            if layer.target == name or not (layer.target in on or layer.target in taken or len(layer.names) > 1):
                taken.add(layer.target)
                layers.append(layer)
                continue
            reason = (
                f"its last step {layer.target!r} is adapted itself, or shared, so it takes a new module: {WITH_MODEL}"
            )
        reasons[name] = reason
    return layers, reasons


def _class_refusal(name: str, here: Sequence[StoredAdapter], notes: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why the class of a module makes its merge none for files, or None."""
    strange = next((note["class"] for note in notes if "class" in note), None)
    if strange is None:
        return None
    if all(each.file.layers[name].place == "parallel" for each in here):
        return f"its class {strange} may compute more than the convolution of its weight, which files do not tell: {WITH_MODEL}"
    return f"an adapter on the output of a {strange} becomes a new module: {WITH_MODEL}"


def _layer(name: str, here: Sequence[StoredAdapter], notes: Sequence[Mapping[str, Any]]) -> StoredLayer:
    records = [each.file.layers[name] for each in here]
    said = [
        (note.get("target", name), ConvGeometry.from_dict(note["geometry"] if "target" in note else record.geometry))
        for note, record in zip(notes, records, strict=True)
    ]
    for each, other in zip(here, said, strict=True):
        if other != said[0]:
            raise AdapterFileError(
                f"{here[0].path} and {each.path} disagree on {name!r}: {said[0][0]} {said[0][1]}, and {other[0]} {other[1]}"
            )
    target, geometry = said[0]
    others: list[str] = next((note["names"] for note in notes if "names" in note), [])
    reader = next((note["reader"] for note in notes if "reader" in note), None)
    return StoredLayer(name, target, geometry, (target, *others), tuple(here), reader)


def merge_outlook(file: AdapterFile) -> dict[str, str | None]:
    """Return, for each layer of an adapter file, why it has no merged form for ``merge_files``, as far as the header tells.

    None stands for a layer that merges, if its kernel need not become larger.
    """
    found: dict[str, str | None] = {}
    for name, record in file.layers.items():
        note = (file.hosts or {}).get(name, {})
        found[name] = _kind_refusal(record.kind)
        if found[name] is None and "class" in note:
            found[name] = f"only with the model: it is a {note['class']}"
        elif found[name] is None and "reader" in note:
            found[name] = f"only with the model: its weight may be read elsewhere ({note['reader']})"
    return found


def _kind_refusal(kind: str) -> str | None:
    try:
        return adapter_class(kind).merge_refusal
    except UnknownKind as error:
        return str(error)
