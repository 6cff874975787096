"""The whole contract on the real detector: YOLO-World-v2 n, s and l with ultralytics' own loss."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

import convpeft
from benchmarks.detectors.comparisons import tensors
from examples.yolo_world.training.model import SCALES, copy_model
from tests.cases import assert_relative, bits, same_bits
from tests.world import (
    LAST,
    MERGEABLE,
    MIXED,
    OTHER,
    layer_outputs,
    loss_of,
    moved,
    outputs,
    pictures,
    same,
    train,
    world,
)

every_scale = pytest.mark.parametrize("scale", SCALES)
small_scales = pytest.mark.parametrize("scale", ["n", "s", pytest.param("l", marks=pytest.mark.nightly)])


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def test_a_seed_gives_the_same_base_whatever_was_built_before():
    from ultralytics.nn.modules.head import Detect
    from ultralytics.nn.tasks import DetectionModel

    from examples.yolo_world.training.model import build_world_model

    before = Detect.legacy
    first = build_world_model("n").state_dict()
    try:
        DetectionModel("yolov8n.yaml", verbose=False)
        assert Detect.legacy
        assert all(torch.equal(value, first[key]) for key, value in build_world_model("n").state_dict().items())
        assert Detect.legacy
    finally:
        Detect.legacy = before


@every_scale
def test_injecting_changes_no_output(scale):
    model = world(scale)
    before = outputs(model)
    convpeft.inject(model, MIXED)
    assert same(outputs(model), before)
    assert {layer.kind for layer in convpeft.plan(world(scale), MIXED).layers} == {"lora", "rep_mona", "bottleneck"}


@small_scales
def test_injecting_changes_no_output_of_a_batch(scale):
    """Against the base as frozen: on a batch, one text for all images, torch picks a Linear's kernel by what trains."""
    model = world(scale)
    convpeft.inject(model, MIXED)
    assert same(outputs(model, pictures()), outputs(world(scale).requires_grad_(False), pictures()))


@every_scale
def test_base_keys_keep_their_names_and_order_and_a_base_checkpoint_loads(scale):
    model, checkpoint = world(scale), bits(world(scale, seed=7))
    keys = list(model.state_dict())
    convpeft.inject(model, MIXED, name="screw")
    moved(model)
    adapters = {key: value for key, value in bits(model).items() if ".convpeft.screw." in key}
    assert [key for key in model.state_dict() if ".convpeft." not in key] == keys
    assert model.load_state_dict(checkpoint, strict=True).missing_keys == []
    after = bits(model)
    assert all(torch.equal(after[key], value) for key, value in adapters.items())
    convpeft.eject(model)
    assert same_bits(bits(model), checkpoint)


@small_scales
def test_copies_and_whole_model_files_keep_the_adapters(scale):
    model = world(scale)
    convpeft.inject(model, MIXED, name="screw")
    moved(model)
    expected = outputs(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy_model(model), torch.load(buffer, weights_only=False)):
        assert convpeft.active_adapters(twin) == ("screw",)
        assert same_bits(bits(twin), bits(model))
        assert classes(twin) == classes(model)
        assert same(outputs(twin), expected)
        convpeft.eject(twin)
        assert same_bits(bits(twin), bits(world(scale)))
    assert same(outputs(model), expected)


@small_scales
def test_training_reaches_adapters_and_unfrozen_parts_only(scale):
    model = world(scale)
    base = bits(model)
    report = convpeft.inject(model, MIXED, name="screw")
    train(model)
    loss_of(model).backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad == (p.grad is None)} == set()
    maps = tensors(model(pictures()))
    sum(each.square().mean() for each in maps).backward()  # boxes touch some of the maps, this all of them
    unfrozen = {name for name in base if name.rsplit(".", 1)[0] in report.owned}
    assert {name.rsplit(".", 1)[0].split(".", 2)[1] for name in unfrozen} == {"22"}
    assert len(unfrozen) == 12
    for name, parameter in model.named_parameters():
        expected = ".convpeft.screw." in name or name in unfrozen
        assert parameter.requires_grad == expected, name
        reached = parameter.grad is not None and bool(parameter.grad.count_nonzero())
        assert reached == expected, name
    after = bits(model)
    changed = {name for name, value in base.items() if not torch.equal(after[name], value)}
    assert {name for name in unfrozen if ".cv3." in name} <= changed <= unfrozen


@small_scales
def test_norms_are_held_through_steps_and_train_calls(scale):
    model = world(scale).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 60
    convpeft.inject(model, MIXED, name="a")
    assert not any(norm.training for norm in norms)  # from the injection on, without a call of train()
    before = {key: value for key, value in bits(model).items() if "running" in key or "num_batches" in key}
    train(model, steps=2)
    for mode in (True, False, True, True):
        model.train(mode)
        loss_of(model)
    model.criterion = None
    assert not any(norm.training for norm in norms)
    convpeft.inject(model, OTHER, name="b")  # adapts the norms; what it makes of them goes with it
    assert all(norm.training for norm in norms)
    train(model)
    convpeft.set_active(model, "a")
    assert not any(norm.training for norm in norms)
    after = bits(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    convpeft.eject(model)
    assert all(norm.training for norm in norms)


@every_scale
def test_eject_returns_the_base_bit_for_bit(scale):
    model, fresh = world(scale), world(scale)
    before, objects = outputs(model), {name: id(p) for name, p in model.named_parameters()}
    convpeft.inject(model, MIXED, name="a")
    train(model)
    convpeft.inject(model, OTHER, name="b")
    train(model)
    convpeft.eject(model, "a")
    convpeft.eject(model)
    model.eval()
    assert same_bits(bits(model), bits(fresh))
    assert classes(model) == classes(fresh)
    assert flags(model) == flags(fresh)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert same(outputs(model), before)


@small_scales
def test_adapters_with_different_unfrozen_layers_swap_bit_for_bit(scale, tmp_path):
    model = world(scale)
    bare = outputs(model)
    convpeft.inject(model, MIXED, name="a")
    train(model)
    model.eval()
    expected = {"a": outputs(model), None: bare}
    convpeft.inject(model, OTHER, name="b")
    train(model)
    model.eval()
    expected["b"] = outputs(model)
    assert not any(same(expected[first], expected[second]) for first, second in [("a", "b"), ("a", None), ("b", None)])
    for name in ("a", "b", None, "a", None, "b", "a"):
        convpeft.set_active(model, name)
        assert same(outputs(model), expected[name])
    for name in ("a", "b"):
        fresh = world(scale)
        convpeft.load_adapter(fresh, convpeft.save_adapter(model, tmp_path / name, name=name))
        assert same(outputs(fresh), expected[name])
        convpeft.set_active(fresh, None)
        assert same(outputs(fresh), bare)


@pytest.mark.parametrize(
    ("scale", "form"),
    [
        *[("n", "auto"), ("n", "single"), ("n", "factored")],
        *[pytest.param(*each, marks=pytest.mark.nightly) for each in [("s", "auto"), ("s", "single"), ("l", "auto")]],
    ],
)
def test_every_merged_layer_equals_the_adapted_one(scale, form):
    model = world(scale).double()
    convpeft.inject(model, MERGEABLE)
    moved(model)
    expected, before, adapted = layer_outputs(model), bits(model), classes(model)
    merged = convpeft.merge(model, form=form)
    found = layer_outputs(merged)
    assert found.keys() == expected.keys()
    assert len(found) > 190
    for name, value in expected.items():
        assert_relative(found[name], value)
    assert not [key for key in merged.state_dict() if "convpeft" in key]
    names = {name for name, _ in classes(world(scale))}
    assert [pair for pair in classes(merged) if pair[0] in names] == classes(world(scale))
    extra = {type(module) for name, module in merged.named_modules() if name not in names}
    assert extra <= {nn.ModuleList, nn.Sequential, nn.Conv2d, nn.Linear}
    assert "_convpeft_state" not in merged.__dict__
    assert same_bits(bits(model), before)
    assert classes(model) == adapted
    forms = {row.form for row in convpeft.plan_merge(model, form=form).rows}
    assert forms == {"absorbed", "factored"} if form != "single" else {"absorbed", "single"}


@small_scales
def test_layers_that_cannot_merge_are_named_and_nothing_changes(scale):
    model = world(scale)
    convpeft.inject(model, MIXED)
    moved(model)
    before, seen, expected = bits(model), classes(model), outputs(model)
    for inplace in (False, True) if scale == "n" else (True,):
        with pytest.raises(
            convpeft.MergeError, match=r"3 of \d+ layers cannot merge; the model is unchanged"
        ) as caught:
            convpeft.merge(model, inplace=inplace)
        assert sorted(caught.value.reasons) == ["model.12", "model.15", "model.21"]
        assert {reason.split(",")[0] for reason in caught.value.reasons.values()} == {"its GELU is not linear"}
        assert same_bits(bits(model), before)
        assert classes(model) == seen
    assert same(outputs(model), expected)


@small_scales
def test_fuse_is_refused_on_an_adapted_model(scale):
    model = world(scale)
    convpeft.inject(model, MIXED)
    moved(model)
    before, seen, expected = bits(model), classes(model), outputs(model)
    with pytest.raises(convpeft.HostError, match=r"WorldModel\.fuse\(\) would rewrite layers that carry adapters"):
        model.fuse()
    assert same_bits(bits(model), before)
    assert classes(model) == seen
    assert same(outputs(model), expected)


@small_scales
def test_ultralytics_moving_average_follows_the_adapters(scale):
    from ultralytics.utils.torch_utils import ModelEMA

    model = world(scale)
    convpeft.inject(model, MIXED, name="screw")
    start = bits(model)
    average = ModelEMA(model)
    assert convpeft.active_adapters(average.ema) == ("screw",)
    train(model, lr=0.1)
    average.update(model)
    share = average.decay(1)
    now = bits(model)
    for key, value in average.ema.state_dict().items():
        if value.dtype.is_floating_point:
            torch.testing.assert_close(value, share * start[key] + (1 - share) * now[key], msg=key)
    moving = [key for key in now if not torch.equal(now[key], start[key])]
    assert all(not torch.equal(average.ema.state_dict()[key], start[key]) for key in moving)
    assert len(moving) > 20
    model.eval()
    assert not same(outputs(average.ema), outputs(world(scale)))
    convpeft.eject(average.ema)
    assert list(average.ema.state_dict()) == list(world(scale).state_dict())


RULE = {"match": "model.2.**.conv", "kind": "lora", "rank": 2}
REFUSED = {
    "dead-beside-live": (
        {"rules": [RULE, {"match": "model.99.conv", "kind": "lora"}]},
        r"rule 2: 'model\.99\.conv' matches none",
    ),
    "dead-in-a-list": (
        {"rules": [{**RULE, "match": ["model.2.**.conv", "modle.4.**"]}]},
        r"'modle\.4\.\*\*' matches none",
    ),
    "unknown-key": ({"rules": [{**RULE, "rnak": 4}]}, r"unknown key 'rnak'.*Closest: rank"),
    "rank-0": ({"rules": [{**RULE, "rank": 0}]}, "rank must be above 0, not 0"),
    "contradicting": ({"rules": [RULE, {**RULE, "rank": 8}]}, r"rule 2: .*'model\.2\.\*\*\.conv'.*nothing"),
    "unfreeze-nothing": ({"rules": [RULE], "unfreeze": ["model.13"]}, "unfreeze 1"),
    "unknown-kind": ({"rules": [{**RULE, "kind": "loar"}]}, "unknown kind 'loar'. Closest: lora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_specs_that_cannot_be_are_refused_and_nothing_changes(case):
    spec, match = REFUSED[case]
    model = world("n")
    before, seen, trains = bits(model), classes(model), flags(model)
    with pytest.raises(convpeft.SpecError, match=f"(?s){match}"):
        convpeft.inject(model, spec)
    assert same_bits(bits(model), before)
    assert (classes(model), flags(model)) == (seen, trains)
    assert "_convpeft_state" not in model.__dict__


@small_scales
def test_another_base_is_refused_and_nothing_changes(scale, tmp_path):
    model = world(scale)
    convpeft.inject(model, MIXED, name="screw")
    moved(model)
    path = convpeft.save_adapter(model, tmp_path / "screw.safetensors")
    other = world(scale)
    with torch.no_grad():
        other.get_submodule("model.4.cv1.conv").weight[0, 0, 0, 0] += 1e-3
        other.get_submodule(LAST[0].replace("*", "1")).bias[0] += 1e-3
    before, seen, trains = bits(other), classes(other), flags(other)
    with pytest.raises(convpeft.BaseMismatch, match=r"made on another base: 2 of .* layers differ") as caught:
        convpeft.load_adapter(other, path)
    assert caught.value.layers == ("model.4.cv1.conv", "model.22.cv2.1.2")
    assert same_bits(bits(other), before)
    assert (classes(other), flags(other)) == (seen, trains)
