"""``convpeft inspect``: what an adapter file says of itself."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import click

from ._support import answering, megabytes


@click.command("inspect")
@click.argument("file", type=click.Path())
@answering
def command(file: str) -> tuple[Any, str]:
    """Show what an adapter FILE contains: kinds, ranks, sizes, base, spec, and what merges.

    Only the header is read; no model is needed. Example: convpeft inspect screw.safetensors
    """
    import os

    from convpeft.files.file_layers import merge_outlook
    from convpeft.files.header import inspect_adapter

    said = inspect_adapter(file)
    outlook = merge_outlook(said)
    parameters = dict.fromkeys(said.layers, 0)
    for key, (shape, _) in said.tensors.items():
        part, _, rest = key.partition(":")
        if part == "adapter":
            parameters[rest.rpartition(":")[0]] += math.prod(shape)
    layers = {
        key: {
            "kind": layer.kind, "place": layer.place, "rank": layer.options.get("rank"), "options": layer.options,
            "geometry": layer.geometry, "parameters": parameters[key], "merge": outlook[key] or "yes",
        }
        for key, layer in said.layers.items()
    }  # fmt: skip
    answer = {
        "file": str(file),
        "bytes": os.path.getsize(file),
        "name": said.name,
        "layers": layers,
        "unfrozen": said.owned,
        "norm": said.norm,
        "base": {"layers": said.base},
        "content": said.content,
        "tensors": {key: {"shape": shape, "dtype": dtype} for key, (shape, dtype) in said.tensors.items()},
        "notes_for_merging": said.hosts is not None,
        "spec": said.spec,
    }
    return answer, _text(answer)


def _text(answer: dict[str, Any]) -> str:
    import yaml

    layers = answer["layers"]
    total = sum(layer["parameters"] for layer in layers.values())
    lines = [
        f"adapter {answer['name']!r}: {len(layers)} layers, {total:,} parameters in adapters, {megabytes(answer['bytes'])}",
        f"base: {len(answer['base']['layers'])} layers; norm {answer['norm']}; unfrozen modules: {len(answer['unfrozen'])}"
        + (f" ({', '.join(list(answer['unfrozen'])[:6])})" if answer["unfrozen"] else ""),
    ]
    counts = Counter((layer["kind"], layer["place"], layer["rank"]) for layer in layers.values())
    for (kind, place, rank), count in counts.items():
        lines.append(f"  {count} x {kind}, {place}{'' if rank is None else f', rank {rank}'}")
    no = {key: layer["merge"] for key, layer in layers.items() if layer["merge"] != "yes"}
    lines.append(f"merges: {len(layers) - len(no)} of {len(layers)} layers")
    for key, reason in list(no.items())[:8]:
        lines.append(f"  {key}: {reason}")
    if len(no) > 8:
        lines.append(f"  and {len(no) - 8} more (--json has all)")
    if not answer["notes_for_merging"]:
        lines.append(
            "written by an earlier version: to merge it without a model, load it on its base and save it again"
        )
    lines += ["spec:", yaml.safe_dump(answer["spec"], sort_keys=False, allow_unicode=True).rstrip()]
    return "\n".join(lines)
