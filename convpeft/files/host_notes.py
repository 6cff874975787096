"""What an adapter file notes of the modules that its adapters sit on, so that a merge needs no model.

A layer is noted where a merge has to know more of it than its geometry. One that is not noted is a ``Conv2d``,
``ConvTranspose2d`` or ``Linear`` of torch's own class with one name, whose weight only it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry
from ..errors import shown
from ..hosts.model import AdaptedModel
from ..hosts.modules import base_modules, last_step
from ..hosts.slots import base_class
from ..planning.bypasses import weight_readers

Note = dict[str, Any]

_TEXTS = ("class", "reader", "target")


def notes_of(adapted: AdaptedModel, name: str, changed: Iterable[str]) -> dict[str, Note]:
    """Return a note for each layer of an adapter that is more than a plain layer to a merge, by name.

    Args:
        adapted: the model.
        name: of the adapter.
        changed: names of the modules that it has own tensors of; only their other names are noted.

    Each has some of these entries:

    * ``class``: its forward may do more than the convolution of its weight, since its class is not torch's own;
    * ``names``: its other names in the model;
    * ``reader``: another module that may read its weight, in words;
    * ``target`` and ``geometry``: for an adapter on its output, the plain layer whose output that is.
    """
    modules = base_modules(adapted.root)
    names: dict[int, list[str]] = {}
    for key, module in modules:
        names.setdefault(id(module), []).append(key)
    readers = {key: each.expression for key, each in weight_readers(module for _, module in modules).items()}
    found: dict[str, Note] = {}
    for key, record in adapted.record(name).layers.items():
        layer = adapted.module(key)
        target_key, target = (key, layer) if record.place == "parallel" else last_step(key, layer)
        note: Note = {}
        if record.place == "output":
            note |= _output_note(target_key, target, whole=record.output is None)
        elif not _is_plain(target):
            note["class"] = base_class(target).__name__
        others = [each for each in names[id(target)] if each != target_key]
        if others:
            note["names"] = others
        if id(target) in readers:
            note["reader"] = readers[id(target)]
        if note:
            found[key] = note
    for key in changed:
        others = [each for each in names[id(adapted.module(key))] if each != key]
        if others:
            found.setdefault(key, {})["names"] = others
    return found


def _output_note(name: str, target: nn.Module, *, whole: bool) -> Note:
    if not whole or not _is_plain(target) or isinstance(target, torch.jit.ScriptModule):
        return {"class": base_class(target).__name__}
    return {"target": name, "geometry": ConvGeometry.of(target).to_dict()}


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a module's forward is the convolution of its weight: torch's own classes, and timm's ``Conv2dSame``."""
    kind = base_class(layer)
    return kind in PLAIN_HOSTS or (kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm."))


def note_problems(notes: Any, geometry_problems: Any) -> Iterator[str]:
    """Yield what is wrong with the notes of a file; ``geometry_problems`` are those of a geometry at a place."""
    if not isinstance(notes, dict):
        yield f"hosts is {shown(notes)}"
        return
    for key, note in notes.items():
        if not isinstance(note, dict) or set(note) - {*_TEXTS, "names", "geometry"}:
            yield f"the note on layer {shown(key)} is {shown(note)}"
            continue
        names = note.get("names", [])
        sound = isinstance(names, list) and all(isinstance(each, str) for each in names)
        if not sound or not all(isinstance(note.get(each, ""), str) for each in _TEXTS):
            yield f"the note on layer {shown(key)} is {shown(note)}"
        if ("geometry" in note) != ("target" in note):
            yield f"the note on layer {shown(key)} has a target or a geometry alone"
        elif "geometry" in note:
            yield from (f"the note on layer {shown(key)}: {each}" for each in geometry_problems(note["geometry"], ""))
