"""What cannot merge exactly is refused with its reason, before anything changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import convpeft
from tests.cases import (
    CASES,
    Net,
    Variant,
    adapted,
    assert_relative,
    bits,
    conv,
    named,
    net,
    randomised,
    same_bits,
)

LORA = Variant("lora", "parallel", {"rank": 3})
REP_MONA = Variant("rep_mona", "parallel", {"rank": 2, "kernel_sizes": [3, 5]})
FORMS = pytest.mark.parametrize("form", ["auto", "single", "factored"])


class StandardisedConv(nn.Conv2d):
    """Its weight is standardised on the way (timm's StdConv2d, BiT)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ActivatedConv(nn.Conv2d):
    """An activation lives inside."""

    def forward(self, x):
        return super().forward(x).relu()


class ScaledConv(nn.Conv2d):
    """Twice the convolution: linear, and still not ``conv(x, weight)``."""

    def forward(self, x):
        return 2 * super().forward(x)


class BiasReadingConv(nn.Conv2d):
    """Uses its bias by itself, so it does not live without one."""

    def forward(self, x):
        return F.conv2d(x, self.weight, None, self.stride, self.padding) + self.bias.view(1, -1, 1, 1)


def with_layer(layer: nn.Module, *kinds: Variant) -> Net:
    """Return the layer in a net with random adapters."""
    model = Net(layer, linear=False).double().eval()
    for number, variant in enumerate(kinds):
        convpeft.inject(model, {"rules": [variant.rule]}, name=f"a{number}")
    convpeft.set_active(model, [f"a{number}" for number in range(len(kinds))])
    return randomised(model)


def assert_refused(model: nn.Module, text: str, **options) -> convpeft.MergeError:
    """The merge says ``text`` about ``layer``, and not a bit has changed, also when it was to be in place."""
    x = torch.randn(2, 4, 9, 8).double()
    before, output = bits(model), model(x).detach()
    for inplace in (True, False):
        classes = [type(module) for module in model.modules()]
        with pytest.raises(convpeft.MergeError, match=text) as caught:
            convpeft.merge(model, inplace=inplace, **options)
        assert set(caught.value.reasons) == {"layer"}
        assert same_bits(before, bits(model))
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(x), output)
    return caught.value


@pytest.mark.parametrize(
    ("host", "form"),
    [
        (StandardisedConv, "single"),
        *[(host, form) for host in (ActivatedConv, ScaledConv) for form in ("auto", "single", "factored")],
    ],
)
def test_the_probe_finds_forwards_that_are_not_the_convolution(host, form):
    model = with_layer(host(4, 6, 3, padding=1), LORA)
    assert_refused(
        model, r"does not compute what the adapted one does: largest output \d.*, largest difference \d", form=form
    )


@pytest.mark.parametrize("host", [StandardisedConv, ActivatedConv, ScaledConv])
@torch.no_grad()
def test_a_chain_beside_any_forward_is_exact(host):
    model, x = with_layer(host(4, 6, 3, padding=1), REP_MONA), torch.randn(2, 4, 9, 8).double()
    model.layer.bias.zero_()  # the chain takes the bias out of the forward, and ReLU(x) + b is not ReLU(x + b)
    assert_relative(convpeft.merge(model, form="factored").layer(x), model.layer(x))
    assert_refused(model, "does not compute what the adapted one does", form="single")


@pytest.mark.parametrize("form", ["auto", "factored"])
@torch.no_grad()
def test_a_kernel_that_would_be_absorbed_stands_beside_a_forward_that_is_not_the_convolution(form):
    model, x = with_layer(StandardisedConv(4, 6, 3, padding=1), LORA), torch.randn(2, 4, 9, 8).double()
    (row,) = convpeft.plan_merge(model, form=form).rows
    assert (row.form, row.reason) == ("factored", "its forward is more than the convolution of its weight")
    merged = convpeft.merge(model, form=form).layer
    assert torch.equal(merged.weight, model.layer.weight)
    assert_relative(merged(x), model.layer(x))


def test_a_host_that_reads_its_bias_is_merged_as_one_kernel_or_refused():
    model, x = with_layer(BiasReadingConv(4, 6, 3, padding=1), REP_MONA), torch.randn(2, 4, 9, 8).double()
    assert_relative(convpeft.merge(model, form="single").layer(x), model.layer(x))
    assert_refused(model, "it failed when run alone on an input of shape .*NoneType", form="factored")


@FORMS
@pytest.mark.parametrize("variant", named([LORA, REP_MONA]))
@pytest.mark.parametrize(
    "norm",
    [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["hook", "parametrised", "spectral"],
)
def test_computed_weights_are_refused(norm, variant, form):
    model = with_layer(norm(nn.Conv2d(4, 6, 3, padding=1)), variant)
    (row,) = convpeft.plan_merge(model, form=form).rows
    assert row.form == "kept"
    assert_refused(model, r"its weight is not a plain parameter \(parametrised, weight-normed or pruned\)", form=form)


@FORMS
def test_clamped_tf_same_padding_does_not_grow(form):
    model = with_layer(Conv2dSame(4, 6, 2, stride=3), REP_MONA)
    assert convpeft.plan_merge(model, form=form).refused == {"layer": convpeft.plan_merge(model).rows[0].reason}
    assert_refused(
        model, r"TF-style 'same' padding is clamped \(kernel span \(2, 2\) below stride \(3, 3\)\)", form=form
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value):
    model = adapted(CASES["3x3"], REP_MONA)
    with torch.no_grad():
        model.layer.convpeft.a.mix[0, 0] = value
    with pytest.raises(convpeft.MergeError, match="layer: an adapter has non-finite weights"):
        convpeft.merge(model)
    model = adapted(CASES["3x3"], REP_MONA)
    with torch.no_grad():
        model.layer.weight[0, 0] = value
    with pytest.raises(convpeft.MergeError, match="layer: its own weight or bias is not finite"):
        convpeft.merge(model)
    model = adapted(CASES["3x3"], REP_MONA)
    with torch.no_grad():
        model.layer.bias[0] = value
    with pytest.raises(convpeft.MergeError, match="layer: its own weight or bias is not finite"):
        convpeft.merge(model)


def test_an_overflow_of_the_cast_is_refused():
    model = adapted(CASES["3x3"], LORA, dtype=torch.float16)
    with torch.no_grad():
        model.layer.convpeft.a.down.fill_(300)
        model.layer.convpeft.a.up.fill_(300)
    before = bits(model)
    with pytest.raises(convpeft.MergeError, match=r"layer: its merged weights overflow torch\.float16"):
        convpeft.merge(model, inplace=True)
    assert same_bits(before, bits(model))


def test_nonlinear_kinds_say_why():
    model = adapted(CASES["3x3"], Variant("bottleneck", "output"))
    assert "GELU is not linear" in str(
        convpeft.plan(net(CASES["3x3"]), {"rules": [Variant("bottleneck", "output").rule]})
    )
    assert_refused(model, "layer: its GELU is not linear, so no convolution equals it")
    with pytest.raises(convpeft.NotMergeable, match="GELU"):
        model.layer.convpeft.a.chain()


def test_adapters_that_do_not_fold_into_one_kernel_are_refused():
    model = adapted(CASES["3x3"], LORA, Variant("rep_mona", "output", {"rank": 2, "kernel_sizes": [3]}))
    assert_refused(model, "adapters beside it and on its output that do not fold into one kernel")


def two_hosts() -> nn.Module:
    """Return a net of which ``layer`` merges and ``stem`` does not."""
    model = net(CASES["3x3"])
    rules = [{"match": "layer", "kind": "lora", "rank": 3}, {"match": "stem", "kind": "bottleneck", "reduction": 2}]
    convpeft.inject(model, {"rules": rules})
    return randomised(model)


def test_every_reason_is_listed_and_nothing_is_half_done():
    model = two_hosts()
    before = bits(model)
    with pytest.raises(
        convpeft.MergeError, match=r"1 of 2 layers cannot merge.*\n  stem: its GELU(.|\n)*strict=False"
    ) as caught:
        convpeft.merge(model, inplace=True)
    assert list(caught.value.reasons) == ["stem"]
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("inplace", [True, False])
@torch.no_grad()
def test_not_strict_keeps_what_cannot_merge(inplace):
    model, x = two_hosts(), torch.randn(2, 4, 9, 8).double()
    expected = model(x)
    merged = convpeft.merge(model, strict=False, inplace=inplace)
    assert (merged is model) == inplace
    assert_relative(merged(x), expected, 1e-11)
    assert type(merged.layer) is nn.Conv2d
    assert [key for key in merged.state_dict() if "convpeft" in key and not key.startswith("stem.")] == []
    assert convpeft.active_adapters(merged) == ("default",)
    assert convpeft.check(merged, x).ok
    convpeft.set_active(merged, None)
    assert_relative(merged.stem(x), F.conv2d(x, merged.stem.weight, merged.stem.bias), 1e-14)
    convpeft.eject(merged)
    assert not [key for key in merged.state_dict() if "convpeft" in key]


@torch.no_grad()
def test_not_strict_keeps_what_the_probe_refuses():
    model, x = with_layer(ActivatedConv(4, 6, 3, padding=1), LORA), torch.randn(2, 4, 9, 8).double()
    kept = convpeft.merge(model, strict=False)
    assert torch.equal(kept(x), model(x))
    assert convpeft.active_adapters(kept) == ("a0",)


@torch.no_grad()
def test_not_strict_on_a_mergeable_model_leaves_nothing():
    model = adapted(CASES["3x3"], LORA)
    merged = convpeft.merge(model, strict=False)
    assert type(merged.layer) is nn.Conv2d
    assert convpeft.active_adapters(merged) == ()


def test_a_hook_that_changes_the_output_is_part_of_the_probe():
    model = adapted(CASES["3x3"], LORA)
    model.layer.register_forward_hook(lambda module, arguments, output: output.relu())
    x = torch.randn(2, 4, 9, 8).double()
    with torch.no_grad():
        assert_relative(convpeft.merge(model).layer(x), model.layer(x))
        model = model_with_hooked_chain()
        assert_relative(convpeft.merge(model, form="factored").layer(x), model.layer(x))


def model_with_hooked_chain() -> nn.Module:
    """Return a net whose layer's input is changed by a hook, which a chain beside it has to see as well."""
    model = adapted(CASES["3x3"], REP_MONA)
    model.layer.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0] + 1,))
    return model


def test_a_sequential_whose_last_step_is_shared_cannot_take_a_chain():
    activation = nn.ReLU()
    model = (
        nn.ModuleDict({"layer": nn.Sequential(conv("", 3).build(), activation), "other": activation}).double().eval()
    )
    rule = {"match": "layer", "kind": "lora", "place": "output", "rank": 2, "channels": 6}
    convpeft.inject(model, {"rules": [rule]})
    randomised(model)
    with pytest.raises(convpeft.MergeError, match="Sequential whose last step cannot take the chain"):
        convpeft.merge(model)
    copied = copy.deepcopy(model)
    kept = convpeft.merge(model, strict=False)
    x = torch.randn(2, 4, 9, 8).double()
    assert torch.equal(kept["layer"](x), copied["layer"](x))
