"""``convpeft spec``: check a spec, or write a first one for a model."""

from __future__ import annotations

from typing import Any

import click

from . import _models
from ._support import CommandError, answering


@click.group("spec")
def command() -> None:
    """Check a spec, or write a first one for a model."""


@command.command("check")
@click.argument("file", type=click.Path())
@click.option("--aliases", type=click.Path(), help="A file with the names of positions that the spec uses.")
@click.option("--model", "model_name", metavar="MODEL", help=f"Check it against this model too: {_models.HELP}")
@_models.settings
@answering
def check(file: str, aliases: str | None, model_name: str | None, given: tuple[str, ...]) -> tuple[Any, str]:
    """Check a spec FILE by itself, and against a model if one is given. All problems are named at once.

    Example: convpeft spec check lora.yaml --model timm:resnet50
    """
    import convpeft

    read = convpeft.Spec.load(file, aliases=aliases)
    answer: dict[str, Any] = {"file": file, "rules": len(read.rules), "unfreeze": len(read.entries), "norm": read.norm}
    text = f"{file}: {len(read.rules)} rules, norm {read.norm}; nothing is wrong with it"
    if model_name is not None:
        planned = convpeft.plan(_models.build(model_name, given), read)
        answer |= {
            "model": planned.model_class,
            "adapters": len(planned.layers),
            "trainable": planned.trainable_parameters,
        }
        text += f". On {planned.model_class}: {len(planned.layers)} adapters, {planned.trainable_parameters:,} trainable parameters"
    return answer, text


@command.command("init")
@_models.option
@_models.settings
@click.option("--kind", default="lora", show_default=True, help="Of adapter.")
@click.option("--rank", type=int, default=8, show_default=True)
@click.option("-o", "--output", type=click.Path(), help="The file to write; unset, the spec is printed.")
@click.option("--force", is_flag=True, help="Replace a file.")
@answering
def init(
    model_name: str, given: tuple[str, ...], kind: str, rank: int, output: str | None, force: bool
) -> tuple[Any, str]:
    """Write a commented spec for a model: one rule for its convolutions, and what the model consists of.

    Example: convpeft spec init --model ultralytics:yolov8n.yaml -o lora.yaml
    """
    from pathlib import Path

    from convpeft.files.writing import write
    from convpeft.planning.first_spec import first_spec

    path = None if output is None else Path(output)
    if path is not None and path.exists() and not force:
        raise CommandError(f"{path} is there already; --force replaces it")
    text, planned = first_spec(_models.build(model_name, given), kind=kind, options={"rank": rank}, title=model_name)
    answer = {
        "output": output,
        "adapters": len(planned.layers),
        "trainable": planned.trainable_parameters,
        "spec": text,
    }
    if path is None:
        return answer, text.rstrip()
    write(path, text.encode())
    return answer, f"{path}: {len(planned.layers)} adapters, {planned.trainable_parameters:,} trainable parameters"
