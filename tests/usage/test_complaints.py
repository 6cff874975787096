"""The seven complaints about the hand-wired code convpeft replaces: each fault is shown, and shown to be gone."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import VARIANTS, assert_relative, bits, randomised, same_bits
from tests.detector import A, B, detector, images
from tests.references import hand_wired

REP_MONA = {"match": "box", "kind": "rep_mona", "rank": 4, "kernel_sizes": [3, 5, 7]}


@pytest.mark.parametrize("place", ["parallel", "output"])
@torch.no_grad()
def test_1_a_merged_model_computes_what_the_trained_one_did(place):
    conv = nn.Conv2d(8, 8, 1).double().eval()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    model = nn.ModuleDict({"box": conv})
    convpeft.inject(model, {"rules": [REP_MONA | {"place": place}]})
    trained = randomised(model)["box"](x)
    assert_relative(convpeft.merge(model)["box"](x), trained)

    read = x if place == "parallel" else nn.functional.conv2d(x, conv.weight, conv.bias)
    theirs = nn.functional.conv2d(x, conv.weight, conv.bias) + nn.functional.conv2d(
        read, hand_wired.merge_weights(model["box"].convpeft["default"])
    )
    assert float((theirs - trained).abs().max()) > 0.1 * float(trained.abs().max())


class Silent(nn.Module):
    """A block that tells nobody how many channels it returns, unless it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mix(x), x], 1)


class NeedsTwo(Silent):
    """The same, in a model no generic image can run."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * scale


def test_2_no_block_goes_without_an_adapter_unsaid():
    rule = {"match": "*", "kind": "bottleneck", "reduction": 3, "only": ["Silent", "NeedsTwo"]}
    model = nn.Sequential(Silent())
    assert hand_wired.guess_channels(model[0]) is None
    report = convpeft.plan(model, {"rules": [rule]})
    assert [layer.site.geometry.out_channels for layer in report.layers] == [9]

    model = nn.Sequential(NeedsTwo())
    before = bits(model)
    with pytest.raises(
        convpeft.SpecError, match=r"channels of its output could not be found out[^.]*\. Give channels:"
    ):
        convpeft.inject(model, {"rules": [rule]})
    assert same_bits(before, bits(model))


def test_3_names_freeze_nothing_and_norms_do_not_drift():
    model = detector()
    model.body[0].adapter_of_old = nn.Parameter(torch.ones(1, dtype=torch.float64))
    theirs = copy.deepcopy(model)
    hand_wired.freeze(theirs)
    assert [n for n, p in theirs.named_parameters() if p.requires_grad] == ["body.0.adapter_of_old"]

    convpeft.inject(model, {"rules": [A["rules"][0]]})
    assert all(".convpeft." in name for name, p in model.named_parameters() if p.requires_grad)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.01))
    for _ in range(20):
        model.train()
        model(images()).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())

    theirs.train()(images())
    assert not torch.equal(theirs.stem.norm.running_mean, statistics["stem.norm.running_mean"])


def test_4_adapters_are_files_of_their_own_and_swap_on_one_base(tmp_path):
    model = detector()
    x = images()
    bare, outputs = model(x), {}
    for name, spec in (("a", A), ("b", B)):
        convpeft.inject(model, spec, name=name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        outputs[name] = model(x)
        path = convpeft.save_adapter(model, tmp_path / f"{name}.safetensors", name=name)
        held = {key.split(":")[1] for key in convpeft.inspect_adapter(path).tensors}
        assert held < {layer for layer, _ in model.named_modules()}
    fresh = detector()
    fresh.load_state_dict(convpeft.eject(copy.deepcopy(model)).state_dict(), strict=True)
    for name in outputs:
        convpeft.load_adapter(fresh, tmp_path / f"{name}.safetensors")
    for name in ("a", "b", None, "a"):
        convpeft.set_active(fresh, name)
        assert torch.equal(fresh(x), bare if name is None else outputs[name])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_5_every_parameter_has_a_gradient_in_every_step(variant):
    """One image is the hardest case: a router chooses few experts for it. DDP needs no ``find_unused_parameters``."""
    model = nn.ModuleDict({"layer": nn.Conv2d(8, 8, 3, padding=1)}).double().train()
    convpeft.inject(model, {"rules": [variant.rule]})
    randomised(model)
    out = model["layer"](torch.randn(1, 8, 9, 9, dtype=torch.float64))
    (out.square().mean() + convpeft.auxiliary_loss(model)).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_6_a_few_labelled_images_with_their_class_list_are_a_data_set(tmp_path):
    pytest.importorskip("ultralytics")
    import cv2
    import numpy as np

    from examples.yolo_world.data.datasets import open_dataset
    from examples.yolo_world.data.texts import load_class_texts

    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([["defect"], ["dust"], ["discoloration"], ["coil"]]), encoding="utf-8")
    folder = tmp_path / "labelled"
    folder.mkdir()
    for number in range(8):
        label = ("coil", "defect", "dust", "discoloration")[number % 4]
        cv2.imwrite(str(folder / f"{number}.png"), np.full((64, 64, 3), 20 * number, np.uint8))
        shape = {"label": label, "shape_type": "rectangle", "points": [[8, 8], [40, 24]]}
        content = {"imagePath": f"{number}.png", "imageHeight": 64, "imageWidth": 64, "shapes": [shape]}
        (folder / f"{number}.json").write_text(json.dumps(content), encoding="utf-8")
    splits = open_dataset(folder, size=32, classes=load_class_texts(classes))
    assert splits.classes == ("defect", "dust", "discoloration", "coil")
    assert len(splits.train) + len(splits.test) == 8
    for item in (*splits.train, *splits.test):
        assert torch.allclose(item["bboxes"], torch.tensor([[0.375, 0.25, 0.5, 0.25]]), atol=1e-6)


def test_7_the_rate_is_never_negative_and_an_explosion_is_survived():
    pytest.importorskip("accelerate")
    from examples.yolo_world.training.guard import GuardSettings
    from examples.yolo_world.training.schedule import FLOOR, rate_factor
    from tests.training_toys import toy_trainer

    assert min(hand_wired.cosine(step, 1000) for step in range(1500)) < 0
    assert min(rate_factor(step, 1000) for step in range(1500)) == FLOOR > 0
    exploded = toy_trainer(lr=1e25, steps=60, guard=GuardSettings(streak=10**9, spike=0))
    exploded.run()
    assert not math.isfinite(exploded.curves.losses[-1])
    held = toy_trainer(lr=1e25, steps=120, guard=GuardSettings(lower=0.01, most_returns=40))
    held.run()
    assert math.isfinite(held.curves.losses[-1])
