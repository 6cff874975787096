"""Hosts that are not simply ``Conv2d(...)``: each is adapted as declared, and merged right or refused with a reason."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

import convpeft
from convpeft.hosts.forward import add_to_entry
from tests.cases import OPTIONS, assert_relative, randomised

PARALLEL = ["lora", "rep_mona", "moe_rep_mona", "conv_lora"]
FORMS = ["auto", "single", "factored"]
LORA = {"match": "layer", "kind": "lora", "rank": 2}
REP_MONA = {"match": "layer", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5]}


def hosting(layer: nn.Module, *rules: dict) -> nn.ModuleDict:
    """Return a float64 model of one layer with these adapters, all active and none the identity."""
    model = nn.ModuleDict({"layer": layer}).double().eval()
    for number, rule in enumerate(rules):
        convpeft.inject(model, {"rules": [rule]}, name=f"a{number}")
    convpeft.set_active(model, [f"a{number}" for number in range(len(rules))])
    return randomised(model)


def update_of(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    """Return what the adapter adds to its layer's output."""
    return model["layer"](x) - type(model["layer"]).adapted_from.forward(model["layer"], x)


def image(height: int = 11, width: int = 9) -> torch.Tensor:
    """Return two random images of four channels."""
    return torch.randn(2, 4, height, width, dtype=torch.float64)


def edited(layer: nn.Conv2d, **fields) -> nn.Conv2d:
    """Return a layer whose fields were set after it was made."""
    for name, value in fields.items():
        setattr(layer, name, value)
    return layer


EDITED = {
    "dilated": lambda: edited(nn.Conv2d(4, 6, 3, padding=1), dilation=(2, 2), padding=(2, 2)),
    "dilated-reflect": lambda: edited(
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), dilation=(2, 2), padding=(2, 2)
    ),
    "circular-later": lambda: edited(nn.Conv2d(4, 6, 3, padding=1), padding_mode="circular"),
    "numbers": lambda: edited(nn.Conv2d(4, 6, 3, padding=1), dilation=2, padding=2, stride=1),
    "tuples-of-one": lambda: edited(nn.Conv2d(4, 6, 3, padding=1), padding=(2,), stride=(2,)),
}


@pytest.mark.parametrize("rule", [LORA, REP_MONA], ids=["lora", "rep_mona"])
@pytest.mark.parametrize("name", EDITED)
@torch.no_grad()
def test_fields_set_after_construction_count_as_the_forward_reads_them(name, rule):
    model, x = hosting(EDITED[name](), rule), image()
    expected = model["layer"](x)
    for form in FORMS:
        assert_relative(convpeft.merge(model, form=form)["layer"](x), expected)


TF_SAME = {
    "std": lambda stride, size: StdConv2dSame(4, 6, size, stride=stride, padding="same"),
    "std-by-default": lambda stride, size: StdConv2dSame(4, 6, size, stride=stride),
    "scaled-std": lambda stride, size: ScaledStdConv2dSame(4, 6, size, stride=stride, padding="same"),
}


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", TF_SAME)
@torch.no_grad()
def test_standardised_layers_with_tf_padding_are_adapted_on_the_pixels_they_look_at(name, stride, size):
    layer = TF_SAME[name](stride, size)
    for rule in (LORA, REP_MONA):
        model = hosting(copy.deepcopy(layer), rule)
        twin = hosting(Conv2dSame(4, 6, size, stride=stride), rule)  # the same pixels, and a plain forward
        twin["layer"].convpeft.a0.load_state_dict(model["layer"].convpeft.a0.state_dict())
        for height in (9, 10, 11):
            x = image(height, 12)
            assert_relative(update_of(model, x), update_of(twin, x), 1e-10)
        merged = convpeft.merge(model)["layer"]
        assert type(merged) is type(layer)
        assert_relative(merged(x), model["layer"](x))
        with pytest.raises(convpeft.MergeError, match=r"does not compute what the adapted one does|clamped"):
            convpeft.merge(model, form="single")


@pytest.mark.parametrize("kernel_sizes", [[3], [5, 7]])
@pytest.mark.parametrize("stride", [2, 3, (2, 1)])
@torch.no_grad()
def test_a_strided_1x1_with_tf_padding_takes_a_chain_of_plain_convolutions(stride, kernel_sizes):
    model = hosting(Conv2dSame(4, 6, 1, stride=stride), {**REP_MONA, "kernel_sizes": kernel_sizes})
    for form in ("auto", "factored"):
        merged = convpeft.merge(model, form=form)["layer"]
        assert type(merged) is Conv2dSame
        assert merged.kernel_size == (1, 1)
        assert {type(step) for step in merged.beside[0]} == {nn.Conv2d}
        for height in range(7, 13):
            x = image(height, 12)
            assert_relative(merged(x), model["layer"](x))
    (row,) = convpeft.plan_merge(model).rows
    assert (row.form, row.macs_single) == ("factored", None)
    with pytest.raises(convpeft.MergeError, match=r"clamped.*form='factored' can"):
        convpeft.merge(model, form="single")


@pytest.mark.parametrize("kind", PARALLEL)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@torch.no_grad()
def test_an_adapter_runs_on_every_map_its_layer_runs_on(mode, kind):
    """Down to one pixel: a larger kernel's padding goes on as the layer's own does, round and round, to and fro."""
    options = {**OPTIONS[kind][0], **({"kernel_sizes": [3, 7]} if "mona" in kind else {})}
    rule = {"match": "layer", "kind": kind, "place": "parallel", **options}
    pointwise = hosting(nn.Conv2d(4, 6, 1, padding_mode=mode), rule)
    assert pointwise["layer"](image(1, 1)).shape == (2, 6, 1, 1)
    model, side = hosting(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), rule), 2 if mode == "reflect" else 1
    x = image(side, side)
    assert model["layer"](x).shape == (2, 6, side, side)
    if mode == "circular" and kind in ("lora", "rep_mona"):  # a small map, repeated, is a larger one
        assert_relative(model["layer"](x.repeat(1, 1, 9, 9))[..., :1, :1], model["layer"](x))
    if mode == "reflect" and kind in ("lora", "rep_mona"):  # so is one that was reflected already
        there_and_back = torch.cat([x, x[..., :1, :]], -2)
        wide = torch.cat([there_and_back, there_and_back[..., :1]], -1)
        assert_relative(model["layer"](wide)[..., :2, :2], model["layer"](x))


HOOKED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", HOOKED)
def test_weights_that_a_hook_computed_with_gradients_are_refused_and_kept(name, inplace):
    model = nn.ModuleDict({"layer": HOOKED[name](nn.Conv2d(4, 6, 3, padding=1)), "other": nn.Conv2d(4, 6, 1)}).double()
    with torch.enable_grad():
        model["layer"](image())  # leaves a weight that is no leaf of the graph, which copy.deepcopy refuses
    convpeft.inject(model, {"rules": [{**LORA, "match": "*"}]})
    randomised(model.eval())
    with pytest.raises(convpeft.MergeError, match="layer: its weight is not a plain parameter"):
        convpeft.merge(model, inplace=inplace)
    x = image()
    expected = model["layer"](x), model["other"](x)
    kept = convpeft.merge(model, strict=False, inplace=inplace)
    assert torch.equal(kept["layer"](x), expected[0])
    assert_relative(kept["other"](x), expected[1])
    assert type(kept["other"]) is nn.Conv2d


def test_a_subclass_whose_weight_a_hook_computes_is_planned():
    model = nn.ModuleDict({"layer": weight_norm(Conv2dSame(4, 6, 3))})
    model["layer"](torch.randn(1, 4, 5, 5))
    assert [planned.name for planned in convpeft.plan(model, {"rules": [LORA]}).layers] == ["layer"]


class Doubled(nn.Module):
    """A parametrisation without an inverse."""

    def forward(self, value):
        return 2 * value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [LORA, REP_MONA, {**LORA, "dora": True}], ids=["lora", "rep_mona", "dora"])
@torch.no_grad()
def test_a_computed_bias_is_refused(rule, form):
    layer = nn.Conv2d(4, 6, 3, padding=1)
    parametrize.register_parametrization(layer, "bias", Doubled())
    model = hosting(layer, rule)
    with pytest.raises(convpeft.MergeError, match="layer: its bias is not a plain parameter"):
        convpeft.merge(model, form=form)


@pytest.mark.parametrize("name", ["layer", "other"])
@pytest.mark.parametrize("lazy", [nn.LazyConv2d, nn.LazyConvTranspose2d])
def test_lazy_layers_are_refused_until_they_have_run(lazy, name):
    model = nn.ModuleDict({"layer": lazy(6, 3), "other": nn.Conv2d(4, 6, 1)})
    for function in (convpeft.plan, convpeft.inject):
        with pytest.raises(convpeft.SpecError, match="layer of it is lazy and has no weights yet; run the model once"):
            function(model, {"rules": [{"match": name, "kind": "lora"}]})
    model["layer"](torch.randn(1, 4, 5, 5))
    convpeft.inject(model, {"rules": [{"match": name, "kind": "lora"}]})


class Plain(nn.Conv2d):
    """A subclass and nothing else."""


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@pytest.mark.parametrize("rule", [LORA, {**LORA, "dora": True}], ids=["lora", "dora"])
@torch.no_grad()
def test_a_subclass_may_pad_by_more_than_its_kernel(rule, mode):
    model, x = hosting(Plain(4, 6, 1, padding=(9, 12), padding_mode=mode), rule), image(13, 13)
    assert_relative(convpeft.merge(model)["layer"](x), model["layer"](x))


class FloatsOnly(nn.Conv2d):
    """Its forward knows float32 only, as one with quantisation in it does."""

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float")
        return super().forward(x)


def test_a_forward_that_knows_float32_only_is_adapted_and_its_merge_refused():
    model = nn.ModuleDict({"layer": FloatsOnly(4, 6, 3)})
    convpeft.inject(model, {"rules": [LORA]})
    randomised(model)
    assert model["layer"](image().float()).shape == (2, 6, 9, 7)
    with pytest.raises(convpeft.MergeError, match=r"it failed when run alone .*expected scalar type Float"):
        convpeft.merge(model)


class RoundedUp(nn.Conv2d):
    """Pads as TensorFlow does: for most sizes of input, a large stride leaves nothing to pad."""

    def forward(self, x):
        steps = zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        high, wide = (max((-(-size // step) - 1) * step + taps - size, 0) for size, taps, step in steps)
        return super().forward(F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


def test_a_forward_that_is_as_declared_for_some_sizes_only_is_refused():
    model = nn.ModuleDict({"layer": RoundedUp(4, 6, 3, stride=4)})
    with pytest.raises(convpeft.SpecError, match="it is not the convolution it declares"):
        convpeft.plan(model, {"rules": [LORA]})


@pytest.mark.parametrize("place", ["parallel", "output"])
@pytest.mark.parametrize("kind", ["lora", "rep_mona"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_merging_what_changes_nothing_changes_no_bit(dtype, form, kind, place):
    for layer in (nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 2, stride=2), Conv2dSame(4, 6, 1)):
        model = nn.ModuleDict({"layer": layer}).to(dtype).eval()
        x = image().to(dtype)
        expected = model["layer"](x)
        convpeft.inject(model, {"rules": [{"match": "layer", "kind": kind, "place": place}]})
        assert torch.equal(convpeft.merge(model, form=form)["layer"](x), expected)


@torch.no_grad()
def test_an_adapter_that_adds_nothing_costs_nothing_beside_one_that_does():
    model, x = hosting(nn.Conv2d(4, 6, 1), LORA, REP_MONA), image()
    model["layer"].convpeft.a1.up.zero_()
    (row,) = convpeft.plan_merge(model).rows
    assert row.form == "absorbed"
    assert_relative(convpeft.merge(model)["layer"](x), model["layer"](x))


@pytest.mark.parametrize("kind", PARALLEL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_the_layer_gives(dtype, kind):
    model, x = nn.ModuleDict({"layer": nn.Conv2d(4, 6, 3, padding=1)}).eval(), image().float()
    rules = [{"match": "layer", "kind": kind, "place": "parallel", **options} for options in OPTIONS[kind]]
    with torch.autocast("cpu", dtype=dtype):
        bare = model["layer"](x)
    for number, rule in enumerate(rules):
        convpeft.inject(model, {"rules": [rule]}, name=f"a{number}")
        with torch.autocast("cpu", dtype=dtype):
            output = model["layer"](x)
        assert output.dtype == bare.dtype == dtype
        assert torch.equal(output, bare)


@pytest.mark.parametrize("kind", PARALLEL)
@torch.no_grad()
def test_an_image_without_a_batch_is_served(kind):
    for options in OPTIONS[kind]:
        model = hosting(nn.Conv2d(4, 6, 3, padding=1), {"match": "layer", "kind": kind, "place": "parallel", **options})
        x = image()
        assert_relative(model["layer"](x[0]), model["layer"](x)[0])


@pytest.mark.parametrize("layer", [StdConv2d, ScaledStdConv2d])
@torch.no_grad()
def test_a_layer_that_is_called_twice_and_has_two_names_merges_once(layer):
    shared = layer(4, 4, 3, padding=1)
    model = hosting(shared, REP_MONA)
    model["again"] = shared
    x = image()
    merged = convpeft.merge(model)
    assert merged["layer"] is merged["again"]
    assert_relative(merged["again"](merged["layer"](x)), model["again"](model["layer"](x)))


@pytest.mark.parametrize(
    ("output", "entry"),
    [
        (torch.ones(1, 2), "x"),
        (torch.ones(1, 2), 0),
        ((torch.ones(1, 2),), 1),
        ((torch.ones(1, 2),), "x"),
        ([torch.ones(1, 2)], -2),
        ({"a": torch.ones(1, 2)}, "b"),
        ({"a": torch.ones(1, 2)}, 0),
        (collections.namedtuple("Pair", "a b")(torch.ones(1, 2), torch.ones(1, 2)), "c"),
    ],
)
def test_an_entry_that_is_not_there_is_named(output, entry):
    with pytest.raises(convpeft.HostError, match=f"returned a .* (which has no|without an) entry {entry!r}"):
        add_to_entry(output, output, entry, lambda x: x)
