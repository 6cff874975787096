"""``convpeft plan``: what a spec would do to a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from . import _models
from ._support import answering


@click.command("plan")
@click.option("--spec", required=True, type=click.Path(), help="A spec, YAML or JSON.")
@click.option("--aliases", type=click.Path(), help="A file with the names of positions that the spec uses.")
@_models.option
@_models.settings
@answering
def command(spec: str, aliases: str | None, model_name: str, given: tuple[str, ...]) -> tuple[Any, str]:
    """Show which layers of a model a spec adapts, with what, and whether that merges; nothing is trained or written.

    Example: convpeft plan --spec lora.yaml --model torchvision:retinanet_resnet50_fpn --set num_classes=5
    """
    import convpeft

    read = convpeft.Spec.load(spec, aliases=aliases)
    planned = convpeft.plan(_models.build(model_name, given), read)
    layers = {
        layer.name: {
            "class": layer.class_name, "kind": layer.kind, "place": layer.site.place, "rule": layer.rule,
            "geometry": layer.site.geometry.to_dict(), "options": asdict(layer.options), "parameters": layer.parameters,
            "merge": layer.merge_refusal or "yes",
        }
        for layer in planned.layers
    }  # fmt: skip
    answer = {
        "model": planned.model_class, "layers": layers, "unfrozen": planned.owned, "left": planned.left,
        "base_parameters": planned.base_parameters, "adapter_parameters": planned.adapter_parameters,
        "trainable_parameters": planned.trainable_parameters, "norm": planned.norm,
    }  # fmt: skip
    return answer, str(planned)
