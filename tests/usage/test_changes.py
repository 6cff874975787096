"""What others do to an adapted model afterwards: parametrise, prune, fuse, trace. It works, or it is refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import fusion, parametrize, prune, remove_weight_norm, weight_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm

import convpeft
from tests.cases import assert_relative, bits, randomised, same_bits
from tests.detector import Untouched, images
from tests.usage.test_copies import SPECS, each_spec, two_adapters


class Doubled(nn.Module):
    """A parametrisation with an inverse."""

    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def hooked_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still about
        weight_norm(layer)


CHANGES = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "parametrized-weight-norm": parametrized_weight_norm,
    "weight-norm": hooked_weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=2),
}
UNDO = {
    "parametrize": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    "parametrized-weight-norm": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    "weight-norm": remove_weight_norm,
    "prune": lambda layer: prune.remove(layer, "weight"),
}
each_change = pytest.mark.parametrize("change", CHANGES)
PARALLEL = [name for name in SPECS if name.endswith("parallel")]


@each_change
class TestOnAHost:
    @each_spec
    def test_the_adapters_stay_and_switch(self, name, change):
        model, x = two_adapters(name), images()
        expected = {key: bare_sum(model, key, x, change) for key in ("a", "b", None)}
        CHANGES[change](model.body[0].conv)
        for key in ("b", None, "a"):
            convpeft.set_active(model, key)
            assert_relative(model(x), expected[key])
        with convpeft.disabled(model):
            assert_relative(model(x), expected[None])
        assert convpeft.check(model, x).ok

    @each_spec
    def test_eject_takes_the_adapters_only(self, name, change):
        """The class that parametrize puts on top of ours is kept on top of the layer's own."""
        model, x = two_adapters(name), images()
        layer, before = model.body[0].conv, bits(detector_of(model))
        CHANGES[change](layer)
        convpeft.set_active(model, None)
        bare = model(x)
        convpeft.eject(model)
        assert_relative(model(x), bare)
        assert not [key for key in model.state_dict() if "convpeft" in key]
        assert type(layer).__mro__[-4] is nn.Conv2d
        assert type(layer).__name__ == ("ParametrizedConv2d" if "param" in change else "Conv2d")
        UNDO[change](layer)
        assert type(layer) is nn.Conv2d
        assert_relative(model(x), bare)
        if change == "parametrize":
            assert same_bits(dict(sorted(bits(model).items())), dict(sorted(before.items())))

    @pytest.mark.parametrize("name", PARALLEL)
    def test_undone_before_or_after_it_is_the_same_model(self, name, change):
        model, x = two_adapters(name), images()
        layer = model.body[0].conv
        CHANGES[change](layer)
        changed = model(x)
        UNDO[change](layer)
        assert type(layer).__name__ == "AdaptedConv2d"
        assert_relative(model(x), changed)
        if (
            layer._parameters.get("weight") is not None
        ):  # torch makes a frozen weight a buffer when it undoes its weight norm
            assert_relative(convpeft.merge(model, inplace=True)(x), changed)

    @pytest.mark.parametrize("name", PARALLEL)
    def test_a_merge_is_refused_by_name_and_nothing_changes(self, name, change):
        model, x = two_adapters(name), images()
        CHANGES[change](model.body[0].conv)
        output, seen = model(x).detach(), [type(module) for module in model.modules()]
        with pytest.raises(convpeft.MergeError, match=r"body\.0\.conv: its weight is not a plain parameter"):
            convpeft.merge(model, inplace=True)
        with pytest.raises(convpeft.MergeError, match=r"body\.0\.conv: its weight is not"):
            convpeft.merge(model)
        assert [type(module) for module in model.modules()] == seen
        assert torch.equal(model(x), output)


def detector_of(model: nn.Module) -> nn.Module:
    return convpeft.eject(copy.deepcopy(model))


def bare_sum(model: nn.Module, name: str | None, x: torch.Tensor, change: str) -> torch.Tensor:
    """Return what an adapter gives on a base that was changed before the adapter came: the layer's own values moved."""
    twin = copy.deepcopy(model)
    convpeft.set_active(twin, name)
    layer = twin.body[0].conv
    with torch.no_grad():
        if change == "prune":
            flat = layer.weight.view(-1)
            flat[flat.abs().argsort()[:2]] = 0
    return twin(x).detach()


@each_change
@pytest.mark.parametrize("name", ["lora-parallel", "rep_mona-output"])
class TestOnAnUnfrozenLayer:
    """An adapter's own values of the tensor wait in a drawer, so there is nothing to exchange them with."""

    def test_switching_is_refused_by_name_until_it_is_undone(self, name, change, tmp_path):
        model, x = two_adapters(name), images()
        convpeft.set_active(model, None)
        bare = model(x)
        convpeft.set_active(model, "a")
        CHANGES[change](model.score)
        output = model(x).detach()
        before = Untouched(model)
        for function in (
            lambda: convpeft.set_active(model, None),
            lambda: convpeft.set_active(model, "b"),
            lambda: convpeft.eject(model),
            lambda: convpeft.eject(model, "a"),
            lambda: convpeft.disabled(model).__enter__(),
            lambda: convpeft.save_adapter(model, tmp_path / "a", name="a"),
            lambda: convpeft.inject(model, {"rules": [{"match": "box", "kind": "lora"}]}, name="c"),
        ):
            with pytest.raises(convpeft.StateError, match=r"'score' has lost its weight: .*the model is unchanged"):
                function()
            assert torch.equal(model(x), output)
        before.check()
        assert not (tmp_path / "a").exists()
        UNDO[change](model.score)
        convpeft.set_active(model, None)
        assert torch.equal(model(x), bare)
        convpeft.eject(model)
        assert torch.equal(model(x), bare)

    def test_a_merge_keeps_what_is_shown(self, name, change):
        model, x = two_adapters(name), images()
        CHANGES[change](model.score)
        output = model(x).detach()
        merged = convpeft.merge(model, inplace=True)
        assert_relative(merged(x), output)
        assert not [key for key in merged.state_dict() if "convpeft" in key]


def test_a_forward_that_was_replaced_afterwards_keeps_its_adapter_and_is_not_ejected_under_it():
    """As accelerate's hooks do."""
    model, x = two_adapters("lora-parallel"), images()
    layer, output = model.body[0].conv, model(x)
    inner, calls = layer.forward, []
    layer.forward = lambda *args: calls.append(1) or inner(*args)
    assert torch.equal(model(x), output)
    assert calls == [1]
    assert convpeft.check(model, x).ok
    before = Untouched(model)
    for function in (convpeft.eject, lambda model: convpeft.merge(model, inplace=True)):
        with pytest.raises(convpeft.HostError, match=r"body\.0\.conv: its forward was replaced .* after inject\(\)"):
            function(model)
    before.check()
    del layer.forward
    assert type(convpeft.eject(model).body[0].conv) is nn.Conv2d


class TestFusing:
    @each_spec
    def test_torchs_own_fusing_of_an_adapted_layer_is_refused(self, name):
        model, x = two_adapters(name), images()
        before, output = Untouched(model), model(x)
        hosts = [module for module in model.modules() if isinstance(module, nn.Conv2d) and hasattr(module, "convpeft")]
        hosts = [host for host in hosts if any(host.convpeft.adapters())]
        for host in hosts:
            norm = nn.BatchNorm2d(host.out_channels).double().eval()
            with pytest.raises(convpeft.HostError, match=r"giving it another bias .*convpeft\.merge\(model\) first"):
                fusion.fuse_conv_bn_eval(host, norm)
        assert hosts
        before.check()
        assert torch.equal(model(x), output)

    def test_a_linear_layer_too(self):
        model = nn.Sequential(nn.Linear(4, 4)).eval()
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]})
        with pytest.raises(convpeft.HostError, match="this Linear carries adapters"):
            fusion.fuse_linear_bn_eval(model[0], nn.BatchNorm1d(4).eval())

    def test_after_a_merge_it_is_right(self):
        model, x = two_adapters("lora-parallel"), images()
        merged = convpeft.merge(model)
        stem = merged.stem(x)
        expected = merged.body[0].norm(merged.body[0].conv(stem))
        assert_relative(fusion.fuse_conv_bn_eval(merged.body[0].conv, merged.body[0].norm)(stem), expected)

    @pytest.mark.parametrize("bias", [True, False])
    def test_loading_with_assign_is_no_fusing(self, bias):
        model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=bias))
        checkpoint = bits(model)
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora"}]})
        model.load_state_dict({key: value + 1 for key, value in checkpoint.items()}, assign=True)
        assert torch.equal(model[0].weight, checkpoint["0.weight"] + 1)
        model[0].bias = None
        convpeft.eject(model)
        model[0].bias = nn.Parameter(torch.zeros(3))


BLOCKS = {
    "repvgg_a0": "stages.1.0.conv_kxk.conv",
    "fastvit_t8": "stages.0.blocks.0.token_mixer.mixer.conv_kxk.0.conv",
    "mobileone_s0": "stages.0.0.conv_kxk.0.conv",
}


class TestReparameterising:
    """timm rewrites a copy, block by block."""

    @staticmethod
    def adapted(name: str, kind: str, match: str) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=3).double().eval()
        for module in model.modules():  # else the signal dies on its way
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(0.1)
        convpeft.inject(model, {"rules": [{"match": match, "kind": kind, "rank": 2}], "unfreeze": ["head.fc"]})
        return randomised(model).eval(), torch.rand(1, 3, 64, 64, dtype=torch.float64)

    @pytest.mark.parametrize("name", BLOCKS)
    @pytest.mark.parametrize("kind", ["lora", "rep_mona"])
    @torch.no_grad()
    def test_an_adapted_block_is_refused_and_a_merged_one_is_right(self, name, kind):
        model, x = self.adapted(name, kind, BLOCKS[name])
        output, before = model(x), Untouched(model)
        with pytest.raises(convpeft.HostError, match=r"would rewrite layers that carry adapters and lose them"):
            reparameterize_model(model)
        before.check()
        merged = convpeft.merge(model, form="single" if kind == "lora" else "factored")
        assert_relative(merged(x), output)
        if kind == "lora":
            assert_relative(
                reparameterize_model(merged)(x), output, 1e-9
            )  # timm folds the norms in the model's precision
        else:
            with pytest.raises(
                convpeft.HostError, match="rewrites layers by their weights alone and would pass by the chains"
            ):
                reparameterize_model(merged)

    @torch.no_grad()
    def test_adapters_outside_of_all_blocks_stay_and_what_went_is_named(self):
        """The held norms are folded and gone: the output is right, and a switch says why it cannot be."""
        model, x = self.adapted("repvgg_a0", "lora", "head.fc")
        rewritten = reparameterize_model(model)
        assert_relative(rewritten(x), model(x), 1e-9)
        assert type(rewritten.head.fc).__name__ == "AdaptedLinear"
        for function in (lambda: convpeft.set_active(rewritten, None), lambda: convpeft.merge(rewritten)):
            with pytest.raises(
                convpeft.StateError, match=r"'stem\.conv_kxk\.bn' was adapted and is no longer in the model"
            ):
                function()
        assert_relative(reparameterize_model(convpeft.merge(model))(x), model(x), 1e-9)


@each_spec
def test_fx_traces_the_adapters_along(name):
    """As ``torchvision``'s feature extractors do."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = two_adapters(name), images()
    for key in ("a", "b", None):
        convpeft.set_active(model, key)
        traced = create_feature_extractor(model, {"neck": "neck", "score": "score"})
        assert_relative(traced(x)["score"].detach(), model(x).detach())
    convpeft.set_active(model, "a")
    merged = convpeft.merge(model)
    assert_relative(create_feature_extractor(merged, {"score": "score"})(x)["score"], model(x))


def test_dynamic_quantisation_leaves_adapted_layers_as_they_are():
    model, x = two_adapters("lora-parallel").float(), images().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert torch.equal(quantised(x), model(x))
