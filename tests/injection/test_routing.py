"""Each sample of a batch through its own adapters: as if it ran alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import convpeft
from tests.cases import assert_relative, bits, randomised, same_bits


class Net(nn.Module):
    """A stem, a block that returns a dict, a norm, and a layer that sees channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.block(self.norm(self.stem(x)).relu())
        return {"map": x, "scores": self.head(x.mean((2, 3)) * scale)}


KINDS = {
    "lora": {"match": ["stem", "head"], "kind": "lora", "rank": 2},
    "dora": {"match": "stem", "kind": "lora", "rank": 2, "dora": True},
    "rep_mona": {"match": "block.*", "only": ["Conv2d"], "kind": "rep_mona", "rank": 2},
    "bottleneck": {"match": "block", "kind": "bottleneck", "reduction": 2},
    "hierarchical": {"match": "block", "kind": "hierarchical", "reduction": 2, "heads": 2},
    "mona": {"match": "block", "kind": "mona", "rank": 4},
    "moe_rep_mona": {"match": "block", "kind": "moe_rep_mona", "rank": 4, "load_balancing": 0.1},
    "conv_lora": {"match": "block.0", "kind": "conv_lora", "rank": 2},
    "peft": {"match": "stem", "kind": "peft:loha", "r": 2},
}


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    nn.init.normal_(model.norm.running_mean)
    return model.eval()


def adapted(*specs: dict) -> Net:
    model = net()
    for name, spec in zip("abc", specs, strict=False):
        convpeft.inject(model, spec, name=name)
    return randomised(model)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def alone(model: Net, x: Tensor, names: list) -> dict[str, Tensor]:
    """Return the outputs of each sample run on its own, with its adapters active, put together."""
    outputs = []
    for sample, name in zip(x, names, strict=True):
        with convpeft.using(model, name):
            outputs.append(model(sample[None]))
    return {key: torch.cat([output[key] for output in outputs]) for key in outputs[0]}


NAMES = ["b", None, "a", "b", ["a", "b"], "a"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_each_sample_what_it_gives_alone(kind):
    model, x = adapted({"rules": [KINDS[kind]]}, {"rules": [KINDS["lora"]]}), images(len(NAMES))
    convpeft.set_active(model, "a")
    expected = alone(model, x, NAMES)
    before = {key: value.clone() for key, value in model(x).items()}
    with convpeft.route(model, NAMES):
        found = model(x)
    for key in expected:
        assert_relative(found[key].detach(), expected[key].detach())
    assert not torch.equal(found["scores"][0], found["scores"][1])
    assert all(torch.equal(value, before[key]) for key, value in model(x).items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_training_are_the_sum_of_each_samples_own(kind):
    """Dropout off, norms held; balancing losses are of a batch and left out."""
    names = ["b", None, "a", "b"]
    model, x = adapted({"rules": [KINDS[kind]]}, {"rules": [KINDS["lora"]]}).train(), images(len(names))
    expected: dict[str, Tensor] = {}
    for name in ("a", "b"):
        convpeft.set_active(model, name)
        model.zero_grad()
        mine = [number for number, each in enumerate(names) if each == name]
        sum(model(x[number][None])["scores"].square().sum() for number in mine).backward()
        expected.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    with convpeft.route(model, names):
        groups = convpeft.param_groups(model, lr=0.1)
        model(x)["scores"].square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert sum(len(group["params"]) for group in groups) == sum(".convpeft." in n for n, _ in model.named_parameters())
    for name, gradient in found.items():
        assert_relative(gradient, expected[name])


@pytest.mark.parametrize("training", [False, True])
def test_unfrozen_layers_and_norms_of_their_own_go_with_the_samples(training):
    specs = (
        {"rules": [KINDS["lora"]], "unfreeze": ["block.0", "head"]},
        {"rules": [KINDS["bottleneck"]], "unfreeze": ["block.2"]},
        {"rules": [KINDS["lora"]], "norm": "adapt"},
    )
    model = adapted(*specs)
    with torch.no_grad():
        for name in ("a", "b", "c"):
            convpeft.set_active(model, name)
            for group in convpeft.param_groups(model, lr=1.0):
                for parameter in group["params"]:
                    parameter += 0.1
            model.norm.running_mean += ord(name)
    names = ["c", "a", None, "b", "a"] if not training else ["a", None, "b", "a"]
    x = images(len(names))
    for start in (None, "a", "b", "c"):
        convpeft.set_active(model, start)
        model.train(training)
        before = bits(model)
        expected = alone(model, x, names)
        with convpeft.route(model, names):
            found = model(x)
        for key in expected:
            assert_relative(found[key].detach(), expected[key].detach())
        assert same_bits(bits(model), before)
        assert convpeft.active_adapters(model) == (() if start is None else (start,))


def test_norms_in_training_see_the_samples_of_their_own_adapter():
    model = adapted({"rules": [KINDS["lora"]], "norm": "adapt"}, {"rules": [KINDS["lora"]]})
    model.train()
    x = images(4)
    twin = copy.deepcopy(model)
    convpeft.set_active(twin, "a")
    twin(x[:2])
    with convpeft.route(model, ["a", "a", "b", None]):
        model(x)
    convpeft.set_active(model, "a")
    assert_relative(model.norm.running_mean, twin.norm.running_mean)
    convpeft.set_active(model, None)
    assert torch.equal(model.norm.running_mean, net().norm.running_mean)


def test_the_auxiliary_loss_reaches_the_sum_inside_the_block():
    model = adapted({"rules": [KINDS["moe_rep_mona"]]}, {"rules": [KINDS["lora"]]}).train()
    with convpeft.route(model, ["a", "b", "a"]):
        model(images(3))
        assert float(convpeft.auxiliary_loss(model).detach()) > 0


def test_an_error_in_a_layer_leaves_the_model_as_it_was():
    model = adapted({"rules": [KINDS["lora"]], "unfreeze": ["head"]}, {"rules": [KINDS["bottleneck"]]})
    before = bits(model)
    with convpeft.route(model, ["a", "b"]), pytest.raises(RuntimeError):
        model(torch.zeros(2, 3, 10, 10))  # float32 into float64
    assert same_bits(bits(model), before)
    x = images(2)
    assert torch.equal(model(x)["map"], model(x)["map"])
    with pytest.raises(ZeroDivisionError), convpeft.route(model, ["a", "b"]):
        raise ZeroDivisionError
    convpeft.set_active(model, "a")


class TestRefusals:
    def test_a_batch_of_another_size(self):
        model = adapted({"rules": [KINDS["lora"]]})
        with (
            convpeft.route(model, ["a", None]),
            pytest.raises(
                convpeft.StateError, match=r"given 2 samples, but stem sees inputs of shape \[\(3, 3, 10, 10\)\]"
            ),
        ):
            model(images(3))

    def test_an_output_without_samples(self):
        class Pooled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.sum(0, keepdim=True)

        model = nn.Sequential(nn.Conv2d(3, 4, 1), Pooled()).double()
        rule = {"match": "1", "kind": "lora", "place": "output", "channels": 4}
        convpeft.inject(model, {"rules": [rule]}, name="a")
        with (
            convpeft.route(model, ["a", "a"]),
            pytest.raises(convpeft.StateError, match=r"1 returned shapes .* cannot be routed"),
        ):
            model(images(2))

    @pytest.mark.parametrize(
        ("names", "error", "match"),
        [
            (["a", "nobody"], convpeft.UnknownAdapter, "no adapter is named 'nobody'"),
            ("a", convpeft.StateError, "one entry for each sample"),
            ([], convpeft.StateError, "one entry for each sample"),
            ([["a", "b"]], convpeft.AdapterConflict, "both bring their own weights"),
        ],
    )
    def test_names(self, names, error, match):
        model = adapted(*({"rules": [KINDS["lora"]], "unfreeze": ["head"]} for _ in range(2)))
        with pytest.raises(error, match=match), convpeft.route(model, names):
            pass

    def test_changes_inside_the_block(self, tmp_path):
        model = adapted({"rules": [KINDS["lora"]]})
        convpeft.save_adapter(model, tmp_path / "a.safetensors")
        calls = [
            lambda: convpeft.set_active(model, None),
            lambda: convpeft.using(model, None).__enter__(),
            lambda: convpeft.eject(model),
            lambda: convpeft.inject(model, {"rules": [KINDS["lora"]]}, name="new"),
            lambda: convpeft.load_adapter(model, tmp_path / "a.safetensors", name="new"),
            lambda: convpeft.merge(model),
            lambda: convpeft.route(model, ["a"]).__enter__(),
        ]
        before = bits(model)
        with convpeft.route(model, ["a", None]):
            for call in calls:
                with pytest.raises(convpeft.StateError, match=r"inside convpeft\.route"):
                    call()
        assert same_bits(bits(model), before)

    def test_a_bare_model(self):
        with pytest.raises(convpeft.StateError, match="has no adapters"), convpeft.route(net(), [None]):
            pass
