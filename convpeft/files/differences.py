"""In what two adapter files differ: base, layers, options, and by how much their tensors do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import shortened
from .stored import StoredAdapter, stored_adapters


@dataclass(frozen=True)
class Difference:
    """How a second adapter file differs from a first; true if it does.

    Attributes:
        fields: names of what is said differently of the whole: ``name``, ``spec``, ``norm``, ``unfrozen``.
        base: layers of the base that differ.
        only_first, only_second: layers and unfrozen modules that one of the files has.
        layers: of layers that both have, what is said differently.
        tensors: by key, the largest absolute difference and the norm of the difference by that of the first; None for other
            shapes or dtypes.
    """

    fields: tuple[str, ...]
    base: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    layers: dict[str, tuple[str, ...]]
    tensors: dict[str, tuple[float, float] | None]

    def __bool__(self) -> bool:
        return any(
            (set(self.fields) - {"name"}, self.base, self.only_first, self.only_second, self.layers, self.tensors)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"differ": bool(self), **asdict(self)}

    def __str__(self) -> str:
        lines = [] if self else ["the same adapter on the same base"]
        for what, names in (
            ("said differently", self.fields),
            ("layers of the base that differ", self.base),
            ("only in the first", self.only_first),
            ("only in the second", self.only_second),
        ):
            if names:
                lines.append(f"{what} ({len(names)}): {shortened(names)}")
        lines += [f"{name or '(root)'}: {', '.join(fields)} differ" for name, fields in list(self.layers.items())[:20]]
        apart = {key: value for key, value in self.tensors.items() if value is not None}
        if self.tensors:
            lines.append(
                f"tensors that differ: {len(self.tensors)}, {len(self.tensors) - len(apart)} of them in shape or dtype"
            )
        worst = sorted(apart.items(), key=lambda item: -item[1][1])[:10]
        lines += [f"  {key}: by {largest:.3g} at most, {share:.2%} of its norm" for key, (largest, share) in worst]
        return "\n".join(lines)


def difference(first: Path, second: Path) -> Difference:
    """Return how two adapter files differ.

    Raises:
        AdapterFileError: if one is damaged.
    """
    with stored_adapters([first], [1.0]) as one, stored_adapters([second], [1.0]) as two:
        return _difference(one[0], two[0])


def _difference(first: StoredAdapter, second: StoredAdapter) -> Difference:
    one, two = first.file, second.file
    said: dict[str, Any] = {"name": (one.name, two.name), "spec": (one.spec, two.spec), "norm": (one.norm, two.norm)}
    said["unfrozen"] = (one.owned, two.owned)
    parts = [{*file.layers, *file.owned} for file in (one, two)]
    layers = {}
    for name in one.layers.keys() & two.layers.keys():
        records = asdict(one.layers[name]), asdict(two.layers[name])
        fields = tuple(key for key in records[0] if records[0][key] != records[1][key])
        if fields:
            layers[name] = fields
    tensors: dict[str, tuple[float, float] | None] = {}
    for key in sorted(first.tensors.keys() & second.tensors.keys()):
        here, there = first.tensors[key], second.tensors[key]
        if here.shape != there.shape or here.dtype != there.dtype:
            tensors[key] = None
        elif not torch.equal(here, there):
            apart = (there.double() - here.double()).abs()
            tensors[key] = (float(apart.max()), float(apart.norm() / max(float(here.double().norm()), 1e-300)))
    return Difference(
        tuple(key for key, values in said.items() if values[0] != values[1]),
        tuple(key for key in {**one.base, **two.base} if one.base.get(key) != two.base.get(key)),
        tuple(sorted(parts[0] - parts[1])),
        tuple(sorted(parts[1] - parts[0])),
        {name: layers[name] for name in one.layers if name in layers},
        tensors,
    )
