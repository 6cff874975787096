"""``convpeft verify``: whether an adapter file is whole and was made on this base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ._support import NO, answering


@click.command("verify")
@click.argument("file", type=click.Path())
@click.option("--base", required=True, type=click.Path(), help="The base: .safetensors, an index of shards, or .pt.")
@click.option(
    "--prefix", default="", help="Of the base's keys, where the adapter was put into a part of it: 'backbone.'."
)
@answering
def command(file: str, base: str, prefix: str) -> tuple[Any, str, int]:
    """Check that an adapter FILE is whole, and that BASE is the one it was made on, layer by layer.

    The exit code is 1 when the base is another. No model is needed; a .pt file is read with weights_only=True. Example:
    convpeft verify screw.safetensors --base yolov8l.safetensors
    """
    from convpeft.errors import shortened
    from convpeft.files.base_check import differing_on_disk
    from convpeft.files.checkpoints import opened_checkpoint
    from convpeft.files.stored import stored_adapters

    with opened_checkpoint(Path(base)) as checkpoint, stored_adapters([Path(file)], [1.0]) as stored:
        said = stored[0].file
        differ = differing_on_disk(checkpoint, said, prefix)
    answer = {"file": file, "base": base, "fits": not differ, "layers": len(said.base), "differing": differ}
    text = f"{file} is whole, and {base} is the base it was made on ({len(said.base)} layers)"
    if differ:
        text = f"{file} is whole, but {base} is another base: {len(differ)} of {len(said.base)} layers differ ({shortened(differ)})"
    return answer, text, NO if differ else 0
