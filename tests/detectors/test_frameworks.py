"""The whole contract on detectors of ultralytics, transformers and libreyolo: LoRA on every adaptable layer, one rule."""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convpeft
from convpeft.hosting import SLOT, is_batchnorm_like
from convpeft.matching import matches

from ..cases import assert_relative, bits, same_bits
from ..world import tensors_in
from .zoo_frameworks import ZOO, Entry, image

LAYERS = (nn.Conv2d, nn.Linear)


def _params() -> list[Any]:
    rows = []
    for entry in ZOO:
        absent = importlib.util.find_spec(entry.package) is None
        marks = [pytest.mark.skipif(absent, reason=f"{entry.package} is not installed")]
        rows.append(pytest.param(entry, id=entry.name, marks=marks))
    return rows


each_detector = pytest.mark.parametrize("entry", _params())


@functools.cache
def _built(entry: Entry) -> nn.Module:
    """Return the entry's model with the norm statistics of one batch, as if it had been trained a little."""
    torch.manual_seed(0)
    model = entry.build()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(image(entry.size, 4))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var += norm.running_var.mean()  # a channel that hardly varied would magnify whatever changes it
    return model.eval()


def fresh(entry: Entry, dtype: torch.dtype = torch.float32) -> Any:
    return copy.deepcopy(_built(entry)).to(dtype)


def moved(model: Any) -> Any:
    """Let every adapter change its layer's weight by about a third of the weight's size, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in [m for m in model.modules() if SLOT in m._modules and "screw" in m.convpeft._modules]:
            up, fan_in = layer.convpeft.screw.up, layer.weight[0].numel()
            size = max(float(layer.weight.std()), 0.05 / fan_in**0.5)
            up.copy_(0.3 * size * fan_in**0.5 * torch.randn(up.shape, generator=generator, dtype=torch.float64))
    return model


def adapted(entry: Entry, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model with LoRA everywhere that no longer is the identity, in eval mode; always the same one."""
    model = fresh(entry, dtype)
    torch.manual_seed(0)
    convpeft.inject(model, entry.spec, name="screw")
    return moved(model)


def outputs(entry: Entry, model: Any) -> list[Tensor]:
    """Return every tensor that the model gives for one picture in eval mode."""
    with torch.no_grad():
        return tensors_in(model(image(entry.size, 1, next(model.parameters()).dtype)))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def listed(names: set[str], patterns: tuple[str, ...]) -> set[str]:
    """Return the names that the patterns mean; each pattern must mean one at least."""
    found = {pattern: {name for name in names if matches(pattern, name)} for pattern in patterns}
    assert all(found.values()), found
    return set().union(*found.values())


def layer_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LAYERS)}


@each_detector
def test_one_rule_reaches_every_layer_and_changes_no_output(entry):
    model = fresh(entry)
    layers, before = layer_names(model), outputs(entry, model)
    report = convpeft.inject(model, entry.spec, name="screw")
    assert {layer.name for layer in report.layers} == layers - listed(layers, entry.bare)
    assert same(outputs(entry, model), before)
    assert same(outputs(entry, moved(model)), before) is False


@each_detector
def test_check_names_the_layers_that_take_no_part(entry):
    model = adapted(entry)
    layers = {layer.removesuffix(": screw") for layer in convpeft.check(model, image(entry.size)).never_called}
    assert layers == listed(layer_names(_built(entry)), entry.idle)


@each_detector
def test_its_own_loss_trains_adapters_only_and_holds_norms(entry):
    model = adapted(entry).train()
    before = bits(model)
    assert not any(module.training for module in model.modules() if is_batchnorm_like(module))
    base = {key for key in before if ".convpeft." not in key}
    optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=1e-2))
    entry.loss(model, image(entry.size, 2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".convpeft.screw." in name), name
        assert parameter.grad is None or parameter.requires_grad, name
    layers = layer_names(_built(entry))
    assert silent(model, none=True) == listed(layers, entry.unlearned)
    everything = [each for each in tensors_in(model(image(entry.size, 2))) if each.requires_grad]
    torch.stack(
        [each.square().mean() for each in everything]
    ).sum().backward()  # boxes touch some of the maps, this all
    assert silent(model) == listed(layers, entry.unlearned + entry.still)
    optimizer.step()
    after = bits(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert not changed & base


def silent(model: nn.Module, none: bool = False) -> set[str]:
    """Return the layers with an adapter tensor that got no gradient at all, or (``none`` false) only zeros."""
    found = set()
    for name, parameter in model.named_parameters():
        got = parameter.grad is not None and (none or bool(parameter.grad.count_nonzero()))
        if parameter.requires_grad and not got:
            found.add(name.split(".convpeft.")[0])
    return found


@each_detector
def test_a_saved_adapter_gives_the_same_bits_on_a_fresh_model(entry, tmp_path):
    model = adapted(entry)
    convpeft.save_adapter(model, tmp_path / "screw.safetensors")
    twin = fresh(entry)
    convpeft.load_adapter(twin, tmp_path / "screw.safetensors", name="screw")
    assert same_bits(bits(twin), bits(model))
    assert same(outputs(entry, twin), outputs(entry, model))


@each_detector
def test_merged_equals_adapted_in_float64(entry):
    model = adapted(entry, torch.float64)
    expected = outputs(entry, model)
    plain = convpeft.merge(model)
    assert [(name, type(module)) for name, module in plain.named_modules()] == [
        (name, type(module)) for name, module in fresh(entry).named_modules()
    ]
    found = outputs(entry, plain)
    assert len(found) == len(expected) > 0
    for got, want in zip(found, expected, strict=True):
        assert_relative(got, want)
    assert not same(found, outputs(entry, fresh(entry, torch.float64)))


@each_detector
def test_eject_gives_the_base_back_bit_for_bit(entry):
    model = adapted(entry)
    convpeft.eject(model)
    assert same_bits(bits(model), bits(_built(entry)))
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in _built(entry).named_modules()
    ]
    assert same(outputs(entry, model), outputs(entry, fresh(entry)))


@each_detector
def test_a_deepcopy_keeps_the_adapter(entry):
    model = adapted(entry)
    twin = copy.deepcopy(model)
    assert same(outputs(entry, twin), outputs(entry, model))
    convpeft.eject(twin)
    assert same_bits(bits(twin), bits(_built(entry)))
    assert convpeft.active_adapters(model) == ("screw",)


def test_d_fine_takes_lora_on_every_convolution_with_one_line():
    """At its full size: the small one of the zoo has layers narrower than an adapter."""
    transformers = pytest.importorskip("transformers")
    model = transformers.DFineForObjectDetection(transformers.DFineConfig()).eval()
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    pictures = image(128)
    with torch.no_grad():
        before = tensors_in(model(pictures))
        plan = convpeft.inject(model, {"rules": [{"match": "**", "kind": "lora", "rank": 4, "only": ["Conv2d"]}]})
        assert same(tensors_in(model(pictures)), before)
    assert {layer.name for layer in plan.layers} == convolutions
    assert plan.adapter_parameters < 0.1 * plan.base_parameters
    assert convpeft.check(model, pictures).ok


def test_attention_that_reads_a_weight_past_its_layer_is_refused():
    pytest.importorskip("ultralytics")
    model = fresh(next(entry for entry in ZOO if entry.name == "ultralytics/rt-detr"))
    before = bits(model)
    with pytest.raises(
        convpeft.SpecError, match=r"ma\.out_proj .*cannot host an adapter: its parent MultiheadAttention"
    ):
        convpeft.inject(model, {"rules": [{"match": "**", "kind": "lora", "rank": 2}]})
    assert same_bits(bits(model), before)


def test_a_merge_of_tied_heads_survives_transformers_own_files(tmp_path):
    """D-FINE ties unused heads to the decoder's; a merge gives the decoder's values of their own."""
    pytest.importorskip("transformers")
    entry = next(entry for entry in ZOO if entry.name == "transformers/d-fine")
    model = adapted(entry)
    heads = model.model.decoder.class_embed, model.class_embed
    assert all(one.weight is other.weight for one, other in zip(*heads, strict=True))
    plain = convpeft.merge(model)
    expected = outputs(entry, plain)
    plain.save_pretrained(tmp_path)
    assert same(outputs(entry, type(plain).from_pretrained(tmp_path).eval()), expected)
    plain.tie_weights()
    assert same(outputs(entry, plain), expected)
