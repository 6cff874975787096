"""``convpeft combine``: several adapters in one file."""

from __future__ import annotations

from typing import Any

import click

from ._support import answering


@click.command("combine")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--weight", "weights", multiple=True, type=float, help="One for each file; unset, 1 / number of files.")
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write.")
@click.option(
    "--method", type=click.Choice(["linear", "svd", "ties", "dare"]), default="linear", show_default=True,
    help="How the updates are joined; see the documentation.",
)  # fmt: skip
@click.option("--rank", type=int, help="Of the result; unset, what is needed to lose nothing.")
@click.option("--density", type=float, default=0.5, show_default=True, help="Share that ties and dare keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what dare leaves out.")
@click.option("--name", default="combined", show_default=True, help="Of the adapter in the file.")
@answering
def command(
    files: tuple[str, ...], weights: tuple[float, ...], output: str, method: str, rank: int | None, density: float, seed: int,
    name: str,
) -> tuple[Any, str]:  # fmt: skip
    """Join adapter FILES of one base into one file, with a weight for each, and say how much of their sum is lost.

    Example: convpeft combine a.safetensors b.safetensors --weight 0.5 --weight 0.5 --method svd --rank 8 -o both.safetensors
    """
    import convpeft

    done = convpeft.combine(
        files, weights or None, out=output, method=method, rank=rank, density=density, seed=seed, name=name
    )
    return done.as_dict(), str(done)
