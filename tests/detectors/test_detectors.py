"""One contract for every family of detectors and backbones in the zoo: one short spec, every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import convpeft

from ..cases import assert_relative, randomised
from .steps import STEPS, Bench, Convpeft, built, layers_of, merge
from .zoo import FAMILIES, Family

LORA = Convpeft()
REP_MONA = {"match": "**", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5], "only": ["Conv2d"]}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


@pytest.fixture
def bench(family: Family, tmp_path: Path) -> Bench:
    if family.missing:
        pytest.skip(f"needs {', '.join(family.missing)}: pip install 'convpeft[detectors]'")
    return Bench(family.name, LORA, tmp_path)


@pytest.mark.parametrize("step", STEPS.values(), ids=[name.replace(" ", "-") for name in STEPS])
@families
def test_lora_on_every_layer(bench: Bench, step: Callable[[Bench], None]) -> None:
    step(bench)


@pytest.mark.slow
@families
def test_rep_mona_on_every_convolution_merges(bench: Bench) -> None:
    merge(Bench(bench.name, Convpeft({"rules": [REP_MONA]}), bench.folder))


@families
def test_a_layer_that_cannot_merge_is_named_and_stays(bench: Bench) -> None:
    bare = bench.bare(torch.float64)
    first, *_, last = [name for name, m in bare.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    rules = [
        {"match": last, "kind": "moe_rep_mona", "rank": 4, "kernel_sizes": [1, 3]},
        {"match": first, "kind": "lora"},
    ]
    model = Bench(bench.name, Convpeft({"rules": rules}), bench.folder).scrambled(torch.float64)
    with pytest.raises(convpeft.MergeError, match="1 of 2 layers cannot merge") as caught:
        convpeft.merge(model)
    assert list(caught.value.reasons) == [last]
    part = convpeft.merge(model, strict=False)
    assert LORA.adapted(part) == {last}
    for actual, tensor in zip(bench.raw(part), bench.raw(model), strict=True):
        assert_relative(actual, tensor)


def test_ssdlite_takes_lora_on_every_convolution_with_one_rule_under_a_tenth_of_its_parameters() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = built("torchvision-ssdlite").model
    plan = convpeft.plan(model, {"rules": [{"match": "**", "kind": "lora", "rank": 4}]})
    assert {layer.name for layer in plan.layers} == layers_of(model)
    assert plan.adapter_parameters < 0.1 * plan.base_parameters


def test_standardised_weights_are_refused_by_name() -> None:
    """A normaliser-free network computes each convolution's weight anew; LoRA beside it works, and cannot be absorbed."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("test_nfnet", num_classes=4).double().eval()
    standardised = {name for name, module in model.named_modules() if "Std" in type(module).__name__}
    convpeft.inject(model, LORA.spec)
    assert standardised
    refused = convpeft.plan_merge(randomised(model)).refused
    assert set(refused) == standardised
    assert all("Its forward is not the convolution of its weight alone" in reason for reason in refused.values())
