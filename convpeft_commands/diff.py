"""``convpeft diff``: in what two adapter files differ."""

from __future__ import annotations

from typing import Any

import click

from ._support import NO, answering


@click.command("diff")
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@answering
def command(first: str, second: str) -> tuple[Any, str, int]:
    """Compare two adapter files: base, layers, options, and by how much their tensors differ.

    The exit code is 0 when both hold the same adapter on the same base, and 1 when they differ. Example:
    convpeft diff monday.safetensors friday.safetensors
    """
    from pathlib import Path

    from convpeft.files.differences import difference

    found = difference(Path(first), Path(second))
    return found.as_dict(), str(found), NO if found else 0
