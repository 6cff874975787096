"""A first spec for a model, as commented YAML: one rule for its convolutions, and what the model consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from torch import nn

from ..convolution.geometry import ConvGeometry
from ..errors import SpecError
from ..hosts.modules import base_class, base_modules
from .plan import Plan
from .planner import plan

_MOST_ROUNDS = 20  # each finds up to a hundred layers that the kind cannot serve
_LABEL = re.compile(r"rule 1: (\S+) \(\w+\)")


def first_spec(model: nn.Module, *, kind: str, options: Mapping[str, Any], title: str) -> tuple[str, Plan]:
    """Return a spec as YAML with comments, and its plan on this model: the kind on every convolution that can take it.

    Args:
        model: it is not changed.
        kind: of adapter.
        options: of the kind.
        title: of the model, for the first line.

    Raises:
        SpecError: if no convolution of the model can take the kind.
    """
    left: list[str] = []
    for _ in range(_MOST_ROUNDS):
        match = ["**", *(f"!{name}" for name in left)]
        rule = {"match": match if left else "**", "kind": kind, **options, "only": ["Conv2d"]}
        try:
            planned = plan(model, {"version": 1, "rules": [rule]})
        except SpecError as error:
            refused = [name for name in _LABEL.findall(str(error)) if name not in left]
            if not refused:
                raise
            left += refused
        else:
            return _text(model, rule, planned, title, left), planned
    raise SpecError(
        f"more than {len(left)} convolutions cannot take kind {kind!r}: name those that shall have it by hand"
    )


def _text(model: nn.Module, rule: dict[str, Any], planned: Plan, title: str, left: list[str]) -> str:
    lines = [
        f"# Adapters for {title}: {len(planned.layers)} layers, {planned.trainable_parameters:,} trainable parameters",
        f"# ({100 * planned.trainable_parameters / max(1, planned.base_parameters):.2f} % of the base's "
        f"{planned.base_parameters:,}). Check it after each change: convpeft spec check FILE --model {title}",
        "version: 1",
        "",
        "# The first rule that matches a module wins. In patterns, * stays inside one part of a name, ** crosses any number,",
        "# {a,b} alternates, and a leading ! excludes. Other kinds: docs/adapters.md.",
        "rules:",
    ]
    body = yaml.safe_dump([rule], sort_keys=False, default_flow_style=None, width=110).rstrip()
    lines += [f"  {line}" for line in body.splitlines()]
    if left:
        lines.append(f"# left out, since kind {rule['kind']} cannot serve them: {', '.join(left)}")
    lines += ["", "# Parts of the model with convolutions, for narrower patterns:"]
    lines += [f"#   {line}" for line in _parts(model)]
    lines += [
        "",
        "# Modules that train along with the adapters, whole:",
        "# unfreeze:",
        f"#   - {{match: {_quoted(planned.layers[-1].name)}, lr_mult: 0.5}}",
        "",
        "# frozen holds the norms' statistics and weights; adapt makes them part of the adapter.",
        "norm: frozen",
        "",
    ]
    return "\n".join(lines)


def _parts(model: nn.Module) -> list[str]:
    """Return a line for each part of the model: its pattern, its class, its convolutions, and their channels."""
    modules = base_modules(model)
    convolutions = {name: module for name, module in modules if isinstance(module, nn.Conv2d)}
    depth = 2 if len({name.split(".")[0] for name in convolutions}) < 3 else 1
    groups: dict[str, list[nn.Module]] = {}
    for name, module in convolutions.items():
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(module)
    classes = {name: base_class(module).__name__ for name, module in modules}
    lines = []
    for name, members in groups.items():
        widths = [ConvGeometry.of(member).out_channels for member in members]
        pattern = name if classes[name] == "Conv2d" else f"{name}.**"
        lines.append(
            f"{pattern}: {classes[name]}, {len(members)} x Conv2d, {min(widths)} to {max(widths)} output channels"
        )
    return lines


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"').strip()
