"""One contract for every family of detectors and backbones in the zoo: one short spec, every step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import convpeft
from benchmarks.detectors.comparisons import assert_relative, bits, same, same_bits
from benchmarks.detectors.steps import STEPS, Bench, Convpeft, merges
from benchmarks.detectors.zoo import FAMILIES

from .conftest import BenchOf

REP_MONA = Convpeft({"kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5], "only": ["Conv2d"]})
families = pytest.mark.parametrize("family", FAMILIES)
ONE_OF_EACH = {name.split("-")[0]: name for name in FAMILIES}.values()
one_of_each_codebase = pytest.mark.parametrize("family", ONE_OF_EACH)
the_others_at_night = pytest.mark.parametrize(
    "family", [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]
)


@pytest.mark.parametrize("step", STEPS.values(), ids=[name.replace(" ", "-") for name in STEPS])
@families
def test_lora_on_every_layer(family: str, step: Callable[[Bench], None], bench_of: BenchOf) -> None:
    step(bench_of(family))


@the_others_at_night
def test_rep_mona_on_every_convolution(family: str, bench_of: BenchOf) -> None:
    bench = bench_of(family, REP_MONA)
    model, bare = bench.attached(torch.float64), bench.bare(torch.float64)
    convolutions = {name for name, module in bare.named_modules() if isinstance(module, nn.Conv2d)}
    assert REP_MONA.adapters(model).keys() == convolutions - bench.named(bench.subject.bare)
    same(bench.raw(model), bench.raw(bare))
    merges(bench, bench.scramble(model), bare)


@the_others_at_night
def test_check_names_the_layers_that_take_no_part_in_inference(family: str, bench_of: BenchOf) -> None:
    bench = bench_of(family)
    report = convpeft.check(bench.attached(), *bench.subject.arguments(bench.subject.images()))
    assert {layer.removesuffix(": default") for layer in report.never_called} == bench.named(bench.subject.idle)


@one_of_each_codebase
def test_a_deep_copy_keeps_the_adapter_and_is_another_model(family: str, bench_of: BenchOf) -> None:
    """As an average of the weights over training makes one."""
    bench = bench_of(family)
    model = bench.scrambled()
    expected, before = bench.raw(model), bits(model)
    twin = copy.deepcopy(model)
    same(bench.raw(twin), expected)
    convpeft.eject(twin)
    assert same_bits(bits(twin), bits(bench.subject.model))
    assert same_bits(bits(model), before)
    assert convpeft.active_adapters(model) == ("default",)


@one_of_each_codebase
def test_a_layer_that_cannot_merge_is_named_and_stays(family: str, bench_of: BenchOf) -> None:
    bench = bench_of(family)
    model = bench.bare(torch.float64)
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    first, *_, last = [name for name in plain if bench.subject.adapts(name)]
    mixture = {"match": last, "kind": "moe_rep_mona", "rank": 4, "kernel_sizes": [1, 3]}
    convpeft.inject(model, {"rules": [mixture, {"match": first, "kind": "lora"}]})
    bench.scramble(model)
    with pytest.raises(convpeft.MergeError, match="1 of 2 layers cannot merge") as caught:
        convpeft.merge(model)
    assert list(caught.value.reasons) == [last]
    part = convpeft.merge(model, strict=False)
    assert Convpeft().adapters(part).keys() == {last}
    for actual, tensor in zip(bench.raw(part), bench.raw(model), strict=True):
        assert_relative(actual, tensor)
