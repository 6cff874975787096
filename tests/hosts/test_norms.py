"""The base's norms never move while they are frozen; adapted ones belong to their adapter, statistics and all."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrize

import convpeft
from tests.cases import bits, same_bits
from tests.detector import LORA, Untouched, detector, images


def steps(model, count=3):
    """Train for some steps with a lot of ``train()`` and ``eval()`` around them."""
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
    for _ in range(count):
        for mode in (True, False, True):
            model.train(mode)
        model.apply(lambda module: module.train())
        optimizer.zero_grad()
        model(images(4)).square().sum().backward()
        optimizer.step()


class TestNorms:
    def test_frozen_norms_never_move(self):
        model = detector()
        buffers = [buffer.clone() for buffer in model.buffers()]
        convpeft.inject(model, {"rules": [LORA], "unfreeze": ["body.1"]})
        steps(model)
        assert all(module.training for module in model.modules() if not isinstance(module, nn.BatchNorm2d))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert not any(norm.training for norm in norms)
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.stem.norm.buffers(), strict=False))
        convpeft.eject(model)
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        assert all(norm.training for norm in norms)  # what train() last asked for
        assert all(norm.momentum == 0.1 for norm in norms)

    @pytest.mark.parametrize("training", [True, False])
    def test_modes_come_back(self, training):
        model = detector().train(training)
        model.stem.norm.train(not training)
        before = Untouched(model)
        convpeft.inject(model, {"rules": [LORA]}, name="a")
        assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        convpeft.inject(model, {"rules": [LORA], "norm": "adapt"}, name="b")
        assert model.stem.norm.training is not training
        assert model.body[0].norm.training is training
        convpeft.set_active(model, "a")
        assert not model.stem.norm.training
        convpeft.eject(model)
        before.check()

    def test_adapted_norms_belong_to_the_adapter(self):
        model, x = detector(), images()
        before, own = bits(model), model(x)
        convpeft.inject(model, {"rules": [LORA], "norm": "adapt"}, name="a")
        assert torch.equal(model(x), own)
        steps(model)
        model.eval()
        learnt, trained = bits(model.stem.norm), model(x)
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            assert not torch.equal(learnt[key], before[f"stem.norm.{key}"]), key
        convpeft.set_active(model, None)
        assert torch.equal(model(x), own)
        assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
        model.train()
        model(x)  # the base's statistics are held
        model.eval()
        convpeft.set_active(model, "a")
        assert torch.equal(model(x), trained)
        assert all(torch.equal(a, b) for a, b in zip(learnt.values(), bits(model.stem.norm).values(), strict=False))
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_affine_trains_scale_and_shift_and_holds_the_statistics(self):
        model, x = detector(), images()
        before, own = bits(model), model(x)
        convpeft.inject(model, {"rules": [LORA], "norm": "affine"}, name="a")
        assert torch.equal(model(x), own)
        steps(model)
        assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        learnt, trained = bits(model.stem.norm), model.eval()(x)
        moved = {key for key in learnt if "." not in key and not torch.equal(learnt[key], before[f"stem.norm.{key}"])}
        assert moved == {"weight", "bias"}
        convpeft.set_active(model, None)
        assert torch.equal(model(x), own)
        convpeft.set_active(model, "a")
        assert torch.equal(model(x), trained)
        torch.testing.assert_close(convpeft.merge(model)(x), trained, rtol=1e-12, atol=1e-12)
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_an_adapters_statistics_do_not_leak_into_another(self):
        model, x = detector(), images()
        for name in ("a", "b"):
            convpeft.inject(model, {"rules": [LORA], "norm": "adapt"}, name=name)
        steps(model.train())
        model.eval()
        b = model(x)
        convpeft.set_active(model, "a")
        a = model(x)
        assert not torch.equal(a, b)
        steps(model)
        convpeft.set_active(model.eval(), "b")
        assert torch.equal(model(x), b)

    @pytest.mark.parametrize(
        "norm",
        [
            lambda: nn.SyncBatchNorm(4),
            lambda: BatchNormAct2d(4),
            lambda: nn.BatchNorm2d(4, affine=False),
            lambda: nn.InstanceNorm2d(4, track_running_stats=True),
            lambda: nn.BatchNorm1d(4),
        ],
        ids=["SyncBatchNorm", "BatchNormAct2d", "without affine", "InstanceNorm2d", "BatchNorm1d"],
    )
    @pytest.mark.parametrize("policy", ["frozen", "affine", "adapt"])
    def test_every_norm_with_statistics_is_held(self, norm, policy):
        layer = norm()
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Flatten(2) if isinstance(layer, nn.BatchNorm1d) else nn.Identity(), layer
        )
        before = bits(model)
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}], "norm": policy})
        model.eval().train()
        assert layer.training is (policy == "adapt")
        if policy == "adapt" and not isinstance(layer, nn.SyncBatchNorm):  # that one trains on a GPU only
            model(torch.randn(2, 3, 4, 4))
            assert not torch.equal(layer.running_mean, before["2.running_mean"])
        elif policy != "adapt":
            model(torch.randn(2, 3, 4, 4))
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_a_mode_set_by_hand_is_kept_while_the_norm_is_free(self):
        model = detector()
        convpeft.inject(model, {"rules": [LORA], "norm": "adapt"}, name="a")
        convpeft.inject(model, {"rules": [LORA], "norm": "adapt"}, name="b")
        model.train()
        model.stem.norm.training = False
        convpeft.set_active(model, "a")
        assert not model.stem.norm.training
        assert model.body[0].norm.training

    def test_an_adapter_on_a_held_norm_trains_with_the_model(self):
        model = detector().train()
        convpeft.inject(model, {"rules": [LORA]}, name="a")
        convpeft.inject(model, {"rules": [{"match": "stem.norm", "kind": "bottleneck", "dropout": 0.5}]}, name="b")
        assert model.stem.norm.convpeft.b.training
        assert not model.stem.norm.training


BATCHES = [images(4) + shift for shift in (0, 1, 2)]


class TestResets:
    def test_update_bn_leaves_held_norms_as_they_are(self):
        model = detector()
        x = images()
        before, own = bits(model), model(x)
        convpeft.inject(model, {"rules": [LORA]})
        with pytest.warns(
            UserWarning, match=r"BatchNorm2d.reset_running_stats\(\) leaves a norm as it is.*norm: adapt"
        ):
            torch.optim.swa_utils.update_bn(BATCHES, model)
        assert torch.equal(model.eval()(x), own)
        convpeft.set_active(model, None)
        assert torch.equal(model(x), own)
        assert same_bits(before, bits(convpeft.eject(model)))
        assert model.stem.norm.momentum == 0.1

    def test_update_bn_updates_those_of_an_adapter(self):
        model = detector()
        plain = copy.deepcopy(model)
        torch.optim.swa_utils.update_bn(BATCHES, plain)
        before = bits(model)
        convpeft.inject(model, {"rules": [LORA], "norm": "adapt"})
        torch.optim.swa_utils.update_bn(BATCHES, model)
        assert torch.equal(model.stem.norm.running_mean, plain.stem.norm.running_mean)
        assert model.stem.norm.num_batches_tracked == 3
        assert same_bits(before, bits(convpeft.eject(model)))

    def test_an_averaged_copy_has_the_base_s_statistics(self):
        model = detector()
        convpeft.inject(model, {"rules": [LORA]})
        averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        averaged.update_parameters(model)
        with pytest.warns(UserWarning, match="leaves a norm as it is"):
            torch.optim.swa_utils.update_bn(BATCHES, averaged)
        assert torch.equal(averaged.module.stem.norm.running_var, model.stem.norm.running_var)

    @pytest.mark.parametrize("method", ["reset_running_stats", "reset_parameters"])
    @pytest.mark.parametrize(
        "norm",
        [
            lambda: nn.BatchNorm2d(4),
            lambda: BatchNormAct2d(4),
            lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        ],
    )
    def test_each_reset_waits_until_the_norm_is_free(self, norm, method):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), norm())
        torch.nn.init.uniform_(model[1].running_mean)
        before = bits(model)
        for policy in ("frozen", "adapt"):
            convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}], "norm": policy}, name=policy)
        getattr(model[1], method)()
        assert torch.equal(model[1].running_mean, torch.zeros(4))
        convpeft.set_active(model, "frozen")
        with pytest.warns(UserWarning, match=method):
            getattr(model[1], method)()
        convpeft.eject(model)
        assert same_bits(before, bits(model))
        getattr(model[1], method)()
        assert torch.equal(model[1].running_mean, torch.zeros(4))

    def test_statistics_that_were_forced_come_back(self):
        model = detector()
        before = bits(model)
        convpeft.inject(model, {"rules": [LORA]})
        model.stem.norm.training = True
        model(images(4))
        model.body[0].norm.running_var.zero_()
        assert same_bits(before, bits(convpeft.eject(model)))


class Scaled(nn.BatchNorm2d):
    """A norm whose weight is computed by a property, from a parameter that may train; its own weight stays unused."""

    weight = property(lambda self: self._parameters["own"].exp())


def with_a_property():
    norm = nn.BatchNorm2d(4)
    norm.own = nn.Parameter(torch.full((4,), 0.3))
    norm.__class__ = Scaled
    return norm


class Exponential(nn.Module):
    def forward(self, values):
        return values.exp()


def parametrised(name):
    def make():
        norm = nn.BatchNorm2d(4)
        parametrize.register_parametrization(norm, name, Exponential())
        return norm

    return make


def computed_before_each_pass():
    """As torch.nn.utils.weight_norm does it: a plain attribute, set by a hook."""
    norm = nn.BatchNorm2d(4)
    norm.own = nn.Parameter(torch.full((4,), 0.3))
    del norm.weight
    norm.weight = norm.own.exp()
    norm.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.own.exp()))
    return norm


def hidden_by_an_attribute():
    norm = nn.BatchNorm2d(4)
    norm.own = nn.Parameter(torch.full((4,), 0.3))
    norm.register_forward_pre_hook(lambda module, args: module.__dict__.update(weight=module.own.exp()))
    return norm


def with_a_learnt_variance():
    norm = nn.BatchNorm2d(4)
    del norm.running_var
    norm.running_var = nn.Parameter(torch.full((4,), 1.3))
    return norm


def with_a_computed_mean():
    norm = nn.BatchNorm2d(4)
    norm.own = nn.Parameter(torch.full((4,), 0.3))
    norm.register_forward_pre_hook(lambda module, args: module._buffers.update(running_mean=module.own * 2))
    return norm


NOT_PLAIN = {
    "weight": parametrised("weight"),
    "bias": parametrised("bias"),
    "property": with_a_property,
    "hook": computed_before_each_pass,
    "attribute": hidden_by_an_attribute,
}
LEARNT_STATISTICS = {
    "parameter": with_a_learnt_variance,
    "computed": with_a_computed_mean,
}


@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_a_frozen_norm_whose_tensors_are_computed_gives_their_parameters_a_gradient(make):
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), make(), nn.Conv2d(4, 2, 1)).double()
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]}, lean=lean)
        own = [p for name, p in model[1].named_parameters() if "own" in name or "original" in name]
        for parameter in own:
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        model(torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)).square().sum().backward()
        found.append([parameter.grad for parameter in own])
    assert len(found[0]) > 0
    for expected, got in zip(*found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("make", LEARNT_STATISTICS.values(), ids=LEARNT_STATISTICS)
def test_statistics_that_should_learn_are_torchs_error_and_not_a_lost_gradient(make, lean):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make(), nn.Conv2d(4, 2, 1))
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]}, lean=lean)
    model[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_"):
        model(torch.randn(2, 3, 4, 4))
