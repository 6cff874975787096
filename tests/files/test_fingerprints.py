"""Files that belong to another base are refused with the layers that differ, or taken as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

import convpeft
from convpeft.files import fingerprints
from tests.adapter_files import Other, Small, assert_refused, base, picture, trained
from tests.cases import bits, same_bits


def test_another_base_is_refused_with_exactly_the_layers_that_differ(original):
    for names in (["stem"], ["norm", "head"], ["proj"]):
        model = base()
        with torch.no_grad():
            for name in names:
                next(model.get_submodule(name).parameters()).view(-1)[0].add_(1e-3)
        error = assert_refused(original, f"{len(names)} of 6 layers differ", model, convpeft.BaseMismatch)
        assert sorted(error.layers) == sorted(names)
    model = base()
    model.norm.running_var[1] += 1
    assert assert_refused(original, r"\(norm\)", model, convpeft.BaseMismatch).layers == ("norm",)


def test_a_base_that_only_differs_in_an_unfrozen_layer_or_is_rounded_is_another_base(original):
    model = base()
    with torch.no_grad():
        model.head.bias.add_(1)
    assert assert_refused(original, "any_base=True takes", model, convpeft.BaseMismatch).layers == ("head",)
    for dtype in (torch.bfloat16, torch.float16):
        assert assert_refused(original, "of 6 layers differ", base(dtype), convpeft.BaseMismatch).layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_from_a_cast_of_a_base_loads_on_that_base(tmp_path, dtype):
    path = convpeft.save_adapter(trained(base(dtype)), tmp_path / "cast.safetensors")
    model = base()
    convpeft.load_adapter(model, path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for key, tensor in load_file(path).items():
        part, layer, name = key.split(":")
        module = model.get_submodule(layer)
        stored = module.convpeft["screw"].state_dict() if part == "adapter" else module.state_dict()
        assert torch.equal(stored[name], tensor.float() if tensor.is_floating_point() else tensor), key
    model(picture())
    convpeft.eject(model)
    assert same_bits(bits(model), bits(base()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_file_from_a_cast_of_another_base_does_not(tmp_path, dtype):
    path = convpeft.save_adapter(trained(base(dtype)), tmp_path / "cast.safetensors")
    model = base()
    with torch.no_grad():
        model.stem.weight.view(-1)[0].add_(0.1)
    assert assert_refused(path, "1 of 6 layers differ", model, convpeft.BaseMismatch).layers == ("stem",)
    mixed = base()
    mixed.head.weight.data = (
        mixed.head.weight.data.to(torch.float16).float() if dtype != torch.float16 else mixed.head.weight.data + 1e-2
    )
    assert assert_refused(path, r"\(head\)", mixed, convpeft.BaseMismatch).layers == ("head",)


def test_a_file_loads_on_a_wider_cast_of_its_base(original):
    model = base(torch.float64)
    convpeft.load_adapter(model, original)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model.head.weight, load_file(original)["own:head:weight"].double())


def test_how_often_a_norm_was_updated_is_no_difference(original):
    model = base()
    model.norm.num_batches_tracked += 5
    convpeft.load_adapter(model, original)
    assert torch.equal(model(picture()), trained(base())(picture()))


def test_any_base_takes_another_base_as_it_is(original):
    model, reference = base(seed=5), base(seed=5)
    convpeft.load_adapter(model, original, any_base=True)
    trained(reference)
    torch.testing.assert_close(model.stem.weight, reference.stem.weight, rtol=0, atol=0)
    for key, tensor in load_file(original).items():
        part, layer, name = key.split(":")
        module = model.get_submodule(layer)
        stored = module.convpeft["screw"].state_dict() if part == "adapter" else module.state_dict()
        assert torch.equal(stored[name], tensor)
    convpeft.eject(model)
    assert same_bits(bits(model), bits(base(seed=5)))


def test_any_base_of_another_dtype_takes_the_values_in_its_own_dtype(original, tmp_path):
    model = base(torch.float64)
    convpeft.load_adapter(model, original, any_base=True)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model.head.weight, load_file(original)["own:head:weight"].double())
    large = trained(base(), {"rules": [{"match": "stem", "kind": "lora", "rank": 2}]})
    with torch.no_grad():
        large.stem.convpeft["screw"].up.fill_(1e6)
    path = convpeft.save_adapter(large, tmp_path / "large.safetensors")
    assert_refused(path, "adapter:stem:up overflows torch.float16", base(torch.float16), any_base=True)


def test_another_model_is_refused_even_with_any_base(original):
    wider = Small(width=8).eval()
    assert_refused(original, r"stem \(Conv2d\): 3→8 3×3 here, 3→6 3×3 in the file", wider, any_base=True)
    headless = base()
    del headless.head
    assert_refused(original, "head: not in this model", headless, any_base=True)
    relu = base()
    relu.proj = torch.nn.ReLU()
    assert_refused(
        original, r"proj \(ReLU\) cannot take kind 'lora': beside a layer it serves Conv2d", relu, any_base=True
    )


class Block(torch.nn.Module):
    """A block that tells its channels only when it runs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, channels, 1)

    def forward(self, x):
        return self.conv(x).relu()


def test_a_block_of_other_channels_is_refused_even_with_any_base(tmp_path):
    model = torch.nn.Sequential(Block(6), torch.nn.Identity()).eval()
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "bottleneck", "channels": 6}]})
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    other = torch.nn.Sequential(Block(7), torch.nn.Identity()).eval()
    assert_refused(path, r"0 \(\w+\): 7 output channels here, 6 in the file", other, any_base=True)


def test_another_class_with_the_same_layers_is_fine(original):
    model = base(kind=Other)
    convpeft.load_adapter(model, original)
    assert torch.equal(model(picture()), trained(base())(picture()))


def _changes():
    """Yield ways to write to a weight, by name: through torch, and past its versions."""

    def swap(weight):  # keeps every sum over all of it
        values = weight.data.view(-1)
        first = values[:2].clone()
        values[:2], values[6000:6002] = values[6000:6002].clone(), first

    yield "in place", lambda layer: layer.weight.detach().mul_(2)
    yield "data", lambda layer: layer.weight.data.add_(1e-6)
    yield "one value", lambda layer: layer.weight.data.view(-1)[12345].add_(1e-6)
    yield "numpy", lambda layer: layer.weight.detach().numpy().__setitem__((0, 0), 3.0)
    yield "swapped values", lambda layer: swap(layer.weight)
    yield "another parameter", lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.detach() + 1))
    yield "the last bytes", lambda layer: layer.bias.data[-1:].add_(1)


@pytest.mark.parametrize(("_", "change"), [pytest.param(*each, id=each[0]) for each in _changes()])
def test_a_base_is_hashed_again_only_if_something_wrote_to_it(monkeypatch, _, change):
    hashed = []
    monkeypatch.setattr(
        fingerprints, "digest", lambda own, digest=fingerprints.digest: (hashed.append(1), digest(own))[1]
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 333), torch.nn.Linear(7, 7))
    first = fingerprints.fingerprint(model)
    assert len(hashed) == 2
    assert fingerprints.fingerprint(model) == first
    assert len(hashed) == 3  # the small one: finding out would take as long
    change(model[0])
    second = fingerprints.fingerprint(model)
    assert second["0"] != first["0"]
    assert second["0"] == fingerprints.digest(list(model[0].named_parameters()))
    assert second["1"] == first["1"]


def test_a_copy_and_odd_tensors_are_hashed_for_themselves():
    model = torch.nn.Sequential(torch.nn.Linear(200, 333))
    first = fingerprints.fingerprint(model)
    twin = copy.deepcopy(model)
    assert fingerprints.fingerprint(twin) == first
    twin[0].weight.data.add_(1)
    assert fingerprints.fingerprint(twin) != first
    odd = torch.nn.Module()
    whole = torch.randn(40_001)
    odd.register_buffer("shifted", whole[1:])  # its bytes begin at no multiple of 8
    odd.register_buffer("halves", torch.randn(9999).half())
    odd.register_buffer("empty", torch.empty(0, 3))
    again = [fingerprints.fingerprint(odd) for _ in range(2)]
    assert again[0] == again[1]
    whole[-1] += 1
    assert fingerprints.fingerprint(odd) != again[0]
