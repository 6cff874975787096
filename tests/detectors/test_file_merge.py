"""``merge_files`` gives the tensors of ``merge`` on whole detectors, their names and classes as they are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import convpeft


def convnext():
    import timm

    return timm.create_model("convnext_atto", num_classes=7), "**"


def yolo_world_l():
    from ultralytics.nn.tasks import WorldModel

    return WorldModel("yolov8l-worldv2.yaml", nc=4, verbose=False), "!model.22.dfl.**"


def retinanet():
    from torchvision.models.detection import retinanet_resnet50_fpn

    return retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5), "**"


MODELS = [convnext, *(pytest.param(each, marks=pytest.mark.nightly) for each in (yolo_world_l, retinanet))]


@pytest.mark.parametrize("make", MODELS)
def test_the_tensors_are_those_of_merge(tmp_path, make):
    torch.manual_seed(0)
    model, pattern = make()
    save_file(
        {key: tensor.contiguous() for key, tensor in model.eval().state_dict().items()}, tmp_path / "base.safetensors"
    )
    rule = {
        "match": ["**", pattern] if pattern != "**" else "**",
        "kind": "lora",
        "rank": 4,
        "only": ["Conv2d", "Linear"],
    }
    convpeft.inject(model, {"rules": [rule], "norm": "adapt"})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    done = convpeft.merge_files(tmp_path / "base.safetensors", path, tmp_path / "merged.safetensors")
    expected, found = convpeft.merge(model).state_dict(), load_file(tmp_path / "merged.safetensors")
    assert sorted(found) == sorted(expected)
    assert not [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    assert {row.form for row in done.plan.rows} == {"absorbed"}
