"""What one family has and no other: full sizes, tied heads, attention past a layer, weights made anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import convpeft
from benchmarks.detectors.comparisons import assert_relative, bits, same, same_bits, tensors
from benchmarks.detectors.steps import LORA, layers_of
from tests.cases import randomised

from .conftest import BenchOf


def test_ssdlite_takes_lora_on_every_convolution_with_one_rule_under_a_tenth_of_its_parameters(
    bench_of: BenchOf,
) -> None:
    model = bench_of("torchvision-ssdlite").subject.model
    plan = convpeft.plan(model, {"rules": [{"match": "**", "kind": "lora", "rank": 4}]})
    assert {layer.name for layer in plan.layers} == layers_of(model)
    assert plan.adapter_parameters < 0.1 * plan.base_parameters


def test_d_fine_at_full_size_takes_lora_on_every_convolution_with_one_rule_under_a_tenth_of_its_parameters(
    bench_of: BenchOf,
) -> None:
    """The small one of the zoo has layers narrower than an adapter."""
    bench_of("transformers-d-fine")
    import transformers

    model = transformers.DFineForObjectDetection(transformers.DFineConfig()).eval()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        before = tensors(model(images))
        plan = convpeft.inject(model, {"rules": [{"match": "**", "kind": "lora", "rank": 4, "only": ["Conv2d"]}]})
        same(tensors(model(images)), before)
    assert {layer.name for layer in plan.layers} == convolutions
    assert plan.adapter_parameters < 0.1 * plan.base_parameters
    assert convpeft.check(model, images).ok


def test_tied_heads_keep_their_own_values_in_transformers_files_of_a_merged_model(
    bench_of: BenchOf, tmp_path: Path
) -> None:
    """D-FINE ties heads that nothing calls to the decoder's; here even their adapters are moved."""
    bench = bench_of("transformers-d-fine")
    model = bench.attached(torch.float64)
    heads = model.model.decoder.class_embed, model.class_embed
    assert all(one.weight is other.weight for one, other in zip(*heads, strict=True))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in bench.parameters(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    plain = convpeft.merge(model)
    for actual, tensor in zip(bench.raw(plain), bench.raw(model), strict=True):
        assert_relative(actual, tensor)
    expected = bench.outputs(plain.float())
    plain.save_pretrained(tmp_path)
    same(bench.outputs(type(plain).from_pretrained(tmp_path).eval()), expected)
    plain.tie_weights()
    same(bench.outputs(plain), expected)


def test_attention_that_reads_a_weight_past_its_layer_is_refused(bench_of: BenchOf) -> None:
    model = bench_of("ultralytics-rt-detr").bare()
    before = bits(model)
    message = r"ma\.out_proj .*cannot host an adapter: its parent MultiheadAttention"
    with pytest.raises(convpeft.SpecError, match=message):
        convpeft.inject(model, {"rules": [{"match": "**", **LORA}]})
    assert same_bits(bits(model), before)


def test_standardised_weights_take_a_chain_and_cannot_absorb() -> None:
    """A normaliser-free network computes each convolution's weight anew; LoRA beside it works."""
    model = timm.create_model("test_nfnet", num_classes=4).double().eval()
    standardised = {name for name, module in model.named_modules() if "Std" in type(module).__name__}
    convpeft.inject(model, {"rules": [{"match": "**", **LORA}]})
    assert standardised
    forms = {row.name: row.form for row in convpeft.plan_merge(randomised(model)).rows}
    assert {name for name, form in forms.items() if form == "factored"} == standardised
    refused = convpeft.plan_merge(model, form="single").refused
    assert set(refused) == standardised
    assert all("Its forward is not the convolution of its weight alone" in reason for reason in refused.values())
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    assert_relative(convpeft.merge(model)(x).detach(), model(x).detach())
