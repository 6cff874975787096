"""The recipes of the package: each holds its share on the smallest real model of each family, and merges whole."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import torch
import yaml

import convpeft
from convpeft import Spec, SpecError
from convpeft.planning.parsing import RECIPES
from tests.planning.detectors import MODELS

SHARES = {"light": 0.005, "balanced": 0.025, "strong": 0.08}
POSITIONS = ("neck", "backbone", "towers", "embeddings", "boxes", "classes", "norms")
MERGED = ("yolov8-world", "torchvision-ssdlite")


def alias_files() -> list[str]:
    return sorted(path.stem for path in (RECIPES / "aliases").glob("*.yaml"))


def test_every_alias_file_has_a_model_and_every_position():
    assert alias_files() == sorted(MODELS)
    for name in alias_files():
        data = yaml.safe_load((RECIPES / "aliases" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert tuple(data["aliases"]) == POSITIONS, name


@pytest.mark.parametrize("family", MODELS)
def test_recipes_hold_their_share_and_can_merge(family):
    model = MODELS[family]()
    for recipe, most in SHARES.items():
        plan = convpeft.plan(model, Spec.load(recipe, aliases=family))
        share = plan.trainable_parameters / plan.base_parameters
        assert 0.0005 < share <= most, f"{recipe}: {100 * share:.2f} %"
        assert plan.layers
        assert [layer.name for layer in plan.layers if layer.merge_refusal] == []


@pytest.mark.parametrize("family", MERGED)
def test_recipes_merge_whole(family):
    model = MODELS[family]().eval()
    keys, x = list(model.state_dict()), torch.rand(1, 3, 320, 320)
    heads = {"torchvision-ssdlite": lambda m: m.head(list(m.backbone(x).values()))["bbox_regression"]}
    call = heads.get(family, lambda m: m(x)[0])
    convpeft.inject(model, Spec.load("balanced", aliases=family))
    with torch.no_grad():
        for group in convpeft.param_groups(model, lr=1.0):
            for parameter in group["params"]:
                parameter.add_(0.01 * torch.randn_like(parameter))
        adapted = call(model)
        merged = convpeft.merge(model, form="single")
        torch.testing.assert_close(call(merged), adapted, rtol=1e-3, atol=1e-2)
    assert not any("convpeft" in name for name, _ in merged.named_parameters())
    assert list(merged.state_dict()) == keys


def test_names_of_the_package_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("{neck: ['0']}\n")
    (tmp_path / "balanced").write_text("norm: affine\n")
    assert Spec.load("balanced", aliases="yolo11").norm == "adapt"
    assert Spec.load("./balanced").norm == "affine"
    assert Spec.load(Path("balanced")).norm == "affine"
    assert Spec.load("light", aliases={**dict.fromkeys(POSITIONS, "1"), "neck": "0"}).aliases["neck"] == ("0",)
    with pytest.raises(
        SpecError,
        match=r"balancd is no file, and no recipe of convpeft\. Closest: balanced\. There are: balanced, light, strong",
    ):
        Spec.load("balancd", aliases="yolo11")
    with pytest.raises(
        SpecError,
        match=r"yolo8 is no file, and no alias file of convpeft\. Closest: yolo.*There are: libreyolo-rtmdet, .*yolov8-world",
    ):
        Spec.load("light", aliases="yolo8")
    with pytest.raises(SpecError, match="no alias is named '@neck'"):
        Spec.load("light")


def test_recipes_are_in_the_wheel():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    patterns = config["options.package_data"]["convpeft"].split()
    package = Path(convpeft.__file__).parent
    inside = {path for pattern in patterns for path in package.glob(pattern)}
    assert set(RECIPES.rglob("*.yaml")) <= inside
