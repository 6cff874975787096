"""``convpeft merge``: adapters folded into the tensors of a base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ._support import answering, shown_progress


@click.command("merge")
@click.option("--base", required=True, type=click.Path(), help="The base: .safetensors, an index of shards, or .pt.")
@click.option(
    "--adapter", "adapters", required=True, multiple=True, type=click.Path(), help="An adapter file; again for more."
)
@click.option("--coefficient", "coefficients", multiple=True, type=float, help="One for each adapter; unset, 1.")
@click.option(
    "-o", "--output", required=True, type=click.Path(), help="A .safetensors file, or *.safetensors.index.json."
)
@click.option(
    "--form", type=click.Choice(["auto", "single"]), default="auto", show_default=True,
    help="single takes a larger kernel where auto would need new modules.",
)  # fmt: skip
@click.option("--any-base", is_flag=True, help="Accept a base with other weights.")
@click.option(
    "--prefix", default="", help="Of the base's keys, where the adapters were put into a part of it: 'backbone.'."
)
@click.option("--max-shard-size", type=float, default=5.0, show_default=True, help="Of new shards, in GB.")
@answering
def command(
    base: str, adapters: tuple[str, ...], coefficients: tuple[float, ...], output: str, form: str, any_base: bool, prefix: str,
    max_shard_size: float,
) -> tuple[Any, str]:  # fmt: skip
    """Write the tensors of BASE with adapters folded in; no model and none of its code is needed.

    The result is, bit for bit, what convpeft.merge(model) gives. Layers that would need new modules are refused and named;
    then nothing is written. Example: convpeft merge --base yolov8l.safetensors --adapter screw.safetensors -o merged.safetensors
    """
    import convpeft

    with shown_progress("merging") as progress:
        done = convpeft.merge_files(
            base, adapters, output, form=form, coefficients=coefficients or None, any_base=any_base, prefix=prefix,
            max_shard_bytes=int(max_shard_size * 1e9), progress=progress,
        )  # fmt: skip
    answer = {
        "written": [str(path) for path in done.files],
        "layers": {row.name: {"form": row.form, "before": row.kernel_before, "after": row.kernel_after} for row in done.plan.rows},
        "carried": done.carried,
        "grown": {name: asdict(geometry) for name, geometry in done.grown.items()},
    }  # fmt: skip
    return answer, str(done)
