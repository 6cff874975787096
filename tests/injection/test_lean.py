"""Frozen layers of an adapted model that keep less: the same values and gradients, whatever runs the model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft.injection import install
from tests.cases import assert_relative, bits, same_bits
from tests.lean import LATE, LORA, adapted, gradients, images, net
from tests.saved import kept


@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.SiLU(inplace=True), nn.ReLU(), nn.GELU("tanh"), nn.LeakyReLU(0.2)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_do_not_depend_on_lean(act, training):
    models = [adapted(act=act, lean=flag).train(training) for flag in (True, False)]
    first, second = (model(images()) for model in models)
    assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(models[0](images()), first)
    found, expected = (gradients(model, images()) for model in models)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_relative(gradient, expected[name])


def test_nothing_is_kept_upstream_of_the_first_adapter():
    model = adapted(LATE)
    shapes = {tuple(tensor.shape[1:]) for tensor in kept(model, images())}
    assert shapes
    assert all(shape[-2:] == (6, 6) and shape[0] in (2, 6) for shape in shapes if len(shape) == 3)
    assert not any(tensor.shape[1:] == (8, 6, 6) for tensor in kept(model, images()))


def test_a_frozen_layer_downstream_keeps_no_map():
    chain = nn.Sequential(
        nn.Conv2d(3, 4, 1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(5)), nn.BatchNorm2d(4)
    ).double()
    counts = {}
    for flag in (True, False):
        model = copy.deepcopy(chain)
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 1}]}, lean=flag)
        counts[flag] = sum(tensor.shape[1:] == (4, 12, 12) for tensor in kept(model.train(), images()))
    assert counts == {True: 0, False: 6}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, x = adapted().train(), images().requires_grad_()
    expected = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, gradient in expected.items():
        assert_relative(model.get_parameter(name).grad, gradient)


def test_autocast_runs_in_its_dtype_and_keeps_no_copy_of_a_weight():
    models = [adapted(lean=flag).float().train() for flag in (True, False)]
    x = images().float()
    results = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.float().square().sum().backward()
        results.append((output, model.body.convpeft.default.down.grad))
        assert output.dtype == torch.bfloat16
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-2 * float(results[1][1].abs().max()))
    assert results[0][1].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert not [t for t in kept(models[0], x) if t.shape == models[0].body.weight.shape]


@pytest.mark.parametrize("training", [True, False])
def test_a_compiler_sees_torchs_own_operations_and_follows_the_switch(training):
    model, x = adapted().train(training), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, x)
    for name, gradient in gradients(compiled, x).items():
        assert_relative(gradient, expected[name.removeprefix("_orig_mod.")])
    convpeft.set_active(model, None)
    assert_relative(compiled(x), model(x))


def test_functional_transforms_run_torchs_own_operations():
    model, x = adapted(), images()
    expected = torch.autograd.functional.jacobian(lambda x: model(x).sum(), x)
    assert_relative(torch.func.grad(lambda x: model(x).sum())(x), expected)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert tangent.shape == model(x).shape


def test_state_dict_pickle_copy_and_eject_see_nothing_of_it():
    model, base = adapted(LATE), net()
    assert [key for key in model.state_dict() if "convpeft" not in key] == list(base.state_dict())
    assert isinstance(model.body, nn.Conv2d)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(images()), model(images()))
        assert gradients(other, images()).keys() == gradients(model, images()).keys()
        assert len(kept(other, images())) == len(kept(model, images()))
    convpeft.eject(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert same_bits(bits(model), bits(base))


def test_off_means_that_no_other_layer_is_touched():
    model = adapted(LATE, lean=False)
    assert type(model.body) is nn.Conv2d
    convpeft.inject(model, LATE, name="second", lean=True)
    assert type(model.body) is not nn.Conv2d
    convpeft.inject(model, LATE, name="third", lean=False)
    assert not any(module.convpeft.lean for module in model.modules() if "convpeft" in module._modules)
    convpeft.eject(model)
    assert type(model.body) is nn.Conv2d


def test_a_failed_inject_leaves_it_on(monkeypatch):
    model = adapted(LATE)
    monkeypatch.setattr(install, "train_only", lambda *_: 1 / 0)  # the last step
    with pytest.raises(ZeroDivisionError):
        convpeft.inject(model, LATE, name="second", lean=False)
    assert all(module.convpeft.lean for module in model.modules() if "convpeft" in module._modules)


def test_hooks_on_a_frozen_layer_fire():
    model, seen = adapted(LORA), []
    model.body.register_forward_hook(lambda module, args, output: seen.append("forward"))
    model.body.register_full_backward_hook(lambda module, inner, outer: seen.append("backward"))
    model(images()).sum().backward()
    assert seen == ["forward", "backward"]


def test_a_thawed_layer_trains_as_torch_trains_it():
    model, twin = adapted(LATE), adapted(LATE, lean=False)
    for each in (model, twin):
        each.body.weight.requires_grad_(True)
        each.norm.weight.requires_grad_(True)
    found, expected = gradients(model, images()), gradients(twin, images())
    assert {"body.weight", "norm.weight"} <= found.keys()
    for name, gradient in found.items():
        assert_relative(gradient, expected[name])
