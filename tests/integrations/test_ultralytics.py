"""Fusing a merged YOLO-World: the same numbers from fewer layers, or a refusal; never another output in silence."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")

import convpeft
from convpeft.hosts.chains import attach_chains
from convpeft.integrations.ultralytics import fuse
from examples.yolo_world.training.model import decode
from tests.cases import assert_relative, bits, same_bits
from tests.world import LAST, MERGEABLE, NECK, moved, outputs, pictures, same, world

ON_BLOCKS = {"match": ["model.{12,15}.cv2", "model.21"], "kind": "rep_mona", "rank": 4, "place": "output"}
ON_CONVS = {"match": NECK, "kind": "rep_mona", "rank": 4, "place": "output"}
IN_HEAD = {"match": LAST, "kind": "rep_mona", "rank": 2}


def merged(*rules, form="auto", names=("a",), model=None):
    """Return a float64 model merged with the rules' adapters; several names are merged as a sum."""
    model = world("n").double() if model is None else model
    spec = {"rules": list(rules)} if rules else MERGEABLE
    for number, name in enumerate(names):
        convpeft.inject(model, spec, name=name)
        moved(model, seed=number)
    if len(names) > 1:
        convpeft.set_active(model, names)
    return convpeft.merge(model, form=form)


def with_biases():
    """Return a model whose neck convolutions have a bias before their norm, as other codebases have it."""
    model = world("n").double()
    for number in (12, 15, 18, 21):
        conv = model.get_submodule(f"model.{number}.cv2.conv")
        conv.bias = nn.Parameter(torch.randn(conv.out_channels, dtype=torch.float64))
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def assert_fused(plain: nn.Module) -> nn.Module:
    """Fuse a copy; every output and every box must be as before, and no convolution keep its norm."""
    fused = fuse(copy.deepcopy(plain))
    for got, expected in zip(
        outputs(fused, pictures(torch.float64)), outputs(plain, pictures(torch.float64)), strict=True
    ):
        assert_relative(got, expected)
    found, wanted = (decode(model, pictures(torch.float64), confidence=1e-4) for model in (fused, plain))
    assert sum(len(boxes) for boxes in wanted) > 10
    for boxes, expected in zip(found, wanted, strict=True):
        assert_relative(boxes, expected)
    assert norms(plain) > 60
    assert norms(fused) == 3  # of the contrastive heads, which have no convolution
    assert fused.is_fused()
    assert fuse(fused) is fused
    return fused


def test_absorbed_factored_and_appended_chains_fuse_to_the_same_output():
    plain = merged(*MERGEABLE["rules"], {**ON_BLOCKS, "match": "model.{12,15}"}, IN_HEAD, form="factored")
    fused = assert_fused(plain)
    assert [name for name, _ in fused.named_modules() if name.endswith("cv2.conv.beside")] == [
        f"model.{number}.cv2.conv.beside" for number in (12, 15, 18, 21)
    ]
    for number in (12, 15, 18, 21):
        conv = fused.get_submodule(f"model.{number}.cv2.conv")
        assert conv.bias is None
        assert conv.beside[0][-1].bias is not None


def test_single_kernels_fuse_to_the_same_output():
    plain = merged(*MERGEABLE["rules"][:-1], form="single")  # all but the one on a block's output
    assert not [name for name, _ in plain.named_modules() if name.endswith(("beside", "after"))]
    assert_fused(plain)
    own = copy.deepcopy(plain).fuse(verbose=False)  # without chains ultralytics' own way is right
    for got, expected in zip(outputs(own), outputs(plain), strict=True):
        assert_relative(got, expected)


def test_several_chains_with_and_without_bias_fuse_to_the_same_output():
    rule = {"match": NECK, "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5], "branch_norm": True}
    fused = assert_fused(merged(rule, form="factored", names=("a", "b")))
    assert len(fused.get_submodule("model.12.cv2.conv").beside) == 2


@pytest.mark.parametrize("form", ["factored", "single"])
def test_a_bias_before_the_norm_fuses_to_the_same_output(form):
    rule = {"match": NECK, "kind": "rep_mona", "rank": 2}
    assert_fused(merged(rule, form=form, names=("a", "b"), model=with_biases()))


def test_chains_on_the_outputs_of_blocks_fuse_to_the_same_output():
    assert_fused(merged(ON_BLOCKS))


def test_a_norm_without_affine_parameters_fuses():
    plain = merged({"match": NECK, "kind": "rep_mona", "rank": 2}, form="factored")
    for number in (12, 15):
        plain.get_submodule(f"model.{number}.cv2.conv").requires_grad_(True)
        norm = plain.get_submodule(f"model.{number}.cv2.bn")
        norm.weight = norm.bias = None
    fused = fuse(copy.deepcopy(plain))
    for got, expected in zip(outputs(fused), outputs(plain), strict=True):
        assert_relative(got, expected)
    assert not any(p.requires_grad for p in fused.get_submodule("model.12.cv2").parameters())


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        (ON_CONVS, r"model\.12\.cv2\.conv, model\.15\.cv2\.conv, model\.18\.cv2\.conv, model\.21\.cv2\.conv"),
        ({**ON_CONVS, "match": "model.{12,15}.cv2.bn"}, r"model\.12\.cv2\.bn, model\.15\.cv2\.bn"),
    ],
    ids=["between-conv-and-norm", "after-norm"],
)
def test_chains_that_fusing_would_pass_by_are_refused(rule, layers):
    assert_passed_by(merged(rule), layers)
    assert_passed_by(merged(rule, model=with_biases()), layers)


def test_chains_beside_and_after_one_layer_are_refused():
    """No two merges leave that today (the plan refuses the second); the fold would scale what the later chain reads."""
    model = merged({"match": NECK, "kind": "rep_mona", "rank": 2}, form="factored")
    conv = model.get_submodule("model.15.cv2.conv")
    later = nn.Conv2d(conv.out_channels, conv.out_channels, 1, bias=False).double()
    attach_chains(conv, [nn.Sequential(later)], beside=False)
    assert_passed_by(model, r"model\.15\.cv2\.conv")


def assert_passed_by(model, layers):
    before, seen, expected = bits(model), [type(module) for module in model.modules()], outputs(model)
    with pytest.raises(convpeft.HostError, match=f"pass by the chains of a factored merge at {layers}"):
        fuse(model)
    with pytest.raises(convpeft.HostError, match=r"WorldModel\.fuse\(\) rewrites layers by their weights alone"):
        model.fuse()
    assert same_bits(bits(model), before)
    assert [type(module) for module in model.modules()] == seen
    assert same(outputs(model), expected)


@pytest.mark.parametrize("rules", [(ON_BLOCKS,), (IN_HEAD,)], ids=["on-blocks", "in-head"])
def test_ultralytics_own_fuse_is_right_where_it_passes_no_chain_by(rules):
    model = merged(*rules, form="factored")
    expected = outputs(model, pictures(torch.float64))
    own = copy.deepcopy(model)
    own.fuse(verbose=False)
    for got, wanted in zip(outputs(own, pictures(torch.float64)), expected, strict=True):
        assert_relative(got, wanted)
    assert norms(own) == 3


def test_ultralytics_own_fuse_is_refused_while_chains_are_there():
    model = merged(form="factored")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (model, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        before, expected = bits(twin), outputs(model)
        with pytest.raises(convpeft.HostError, match=r"convpeft\.integrations\.ultralytics\.fuse\(model\)"):
            twin.fuse(verbose=False)
        assert same_bits(bits(twin), before)
        assert same(outputs(twin), expected)


def test_a_block_that_reads_the_weights_itself_is_refused():
    from ultralytics.nn.modules.conv import RepConv

    model = world("n").double()
    model.model[2].cv1 = RepConv(32, 32).double().eval()
    convpeft.inject(model, {"rules": [{"match": "model.2.cv1.conv1.conv", "kind": "rep_mona", "rank": 1}]}, name="a")
    plain = convpeft.merge(moved(model), form="factored")
    before, expected = bits(plain), outputs(plain)
    with pytest.raises(convpeft.HostError, match=r"its own fuse\(\) fails \(AttributeError.*form='single'"):
        fuse(plain)
    assert same_bits(bits(plain), before)
    assert same(outputs(plain), expected)
    assert callable(plain.__dict__["fuse"])  # still guarded
    convpeft.eject(model)
    convpeft.inject(model, {"rules": [{"match": "model.2.cv1.conv1.conv", "kind": "lora", "rank": 1}]})
    absorbed = convpeft.merge(moved(model))
    for got, wanted in zip(outputs(fuse(copy.deepcopy(absorbed))), outputs(absorbed), strict=True):
        assert_relative(got, wanted)


def test_an_adapted_model_is_refused():
    model = world("n")
    convpeft.inject(model, MERGEABLE)
    before = bits(model)
    with pytest.raises(
        convpeft.HostError, match=r"this WorldModel still carries adapters.*convpeft\.merge\(model\) first"
    ):
        fuse(model)
    with pytest.raises(convpeft.HostError, match="would rewrite layers that carry adapters"):
        model.fuse()
    assert same_bits(bits(model), before)


def test_a_model_without_fuse_is_refused_and_a_bare_one_is_just_fused():
    with pytest.raises(convpeft.HostError, match=r"Sequential has no fuse\(\)"):
        fuse(nn.Sequential(nn.Conv2d(3, 3, 1)))
    assert_fused(world("n").double())


def test_float32_stays_float32_and_agrees():
    model = world("n")
    convpeft.inject(model, MERGEABLE)
    plain = convpeft.merge(moved(model), form="factored")
    fused = fuse(copy.deepcopy(plain))
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float32}
    for got, expected in zip(outputs(fused), outputs(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1.3e-6, atol=1e-5 * float(expected.abs().max()))


def test_nothing_imports_ultralytics():
    code = (
        "import sys, convpeft; loaded = [n for n in sys.modules if n.startswith('convpeft.integrations')]; "
        "import convpeft.integrations.ultralytics; assert not loaded; assert 'ultralytics' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
