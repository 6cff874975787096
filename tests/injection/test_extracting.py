"""Adapters extracted from fine-tuned models: exact where the change has a low rank, else as good as its rank allows."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import convpeft
from convpeft import OptionError, Rule, Spec
from convpeft.injection.ranks import Choice, Costs, allocate

LAYERS = {
    "strided": nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect"),
    "pointwise": nn.Conv2d(16, 24, 1, bias=False),
    "grouped": nn.Conv2d(24, 24, 3, dilation=2, padding=2, groups=3),
    "transposed": nn.ConvTranspose2d(24, 16, 2, stride=2),
    "transposed_grouped": nn.ConvTranspose2d(16, 8, 3, groups=2, output_padding=0),
}


class Net(nn.Module):
    """Every sort of convolution, a norm, a depthwise layer, a Linear and a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in LAYERS.items():
            self.add_module(name, copy.deepcopy(layer))
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x):
        for name in LAYERS:
            x = getattr(self, name)(x)
        return self.head(self.depthwise(self.norm(x)).mean((2, 3))) * self.scale


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def image() -> torch.Tensor:
    return torch.randn(2, 8, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def low_rank(layer: nn.Module, rank: int, generator: torch.Generator) -> None:
    """Add an update of this rank in each group to a layer's weight, in place, and change its bias."""
    noise = lambda *shape: 0.2 * torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    for part in layer.weight.data.chunk(groups):  # by hand: (in, out, kh, kw) if transposed, else (out, in, kh, kw)
        rows = part.transpose(0, 1) if transposed else part
        rows += (noise(rows.shape[0], rank) @ noise(rank, rows[0].numel())).reshape(rows.shape)
    if layer.bias is not None:
        layer.bias.data += noise(*layer.bias.shape)


def fine_tuned(base: Net, rank: int = 2) -> Net:
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(2)
    for name in [*LAYERS, "depthwise", "head"]:
        low_rank(getattr(model, name), rank, generator)
    model.norm.weight.data += 0.1
    model.norm.running_mean += 0.3
    model.scale.data *= 1.5
    return model


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_a_change_of_low_rank_comes_back_exactly(as_state_dict, tmp_path):
    base, x = net(), image()
    bare, target = base(x), fine_tuned(base)
    report = convpeft.extract(base, target.state_dict() if as_state_dict else target, energy=1.0, name="tuned")
    close(base(x), target(x))
    how = {layer.name: (layer.how, layer.rank) for layer in report.layers}
    assert how == {
        "": ("whole", 0), "norm": ("whole", 0), "depthwise": ("whole", 0), "head": ("lora", 2),
        **dict.fromkeys(LAYERS, ("lora", 2)),
    }  # fmt: skip
    assert report.left < 1e-12
    assert report.parameters == sum(p.numel() for p in base.parameters() if p.requires_grad)
    close(convpeft.merge(base)(x), target(x))
    path = convpeft.save_adapter(base, tmp_path / "tuned.safetensors")
    other = net()
    convpeft.load_adapter(other, path)
    assert torch.equal(other(x), base(x))
    convpeft.set_active(base, None)
    assert torch.equal(base(x), bare)
    convpeft.eject(base)
    assert torch.equal(base(x), bare)


def test_unfrozen_tensors_are_the_fine_tuned_ones_bit_for_bit():
    base = net()
    target = fine_tuned(base)
    convpeft.extract(base, target, budget=0.9)
    assert torch.equal(base.norm.running_mean, target.norm.running_mean)
    assert torch.equal(base.depthwise.weight, target.depthwise.weight)
    assert torch.equal(base.scale, target.scale)


def perturbed(base: nn.Module, names: list[str], seed: int = 3) -> nn.Module:
    """Return a copy with noise of full rank in some weights; the singular values fall."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for name in names:
        weight = model.get_submodule(name).weight
        noise = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        fall = torch.logspace(0, -2, weight.shape[0], dtype=torch.float64).reshape(-1, *[1] * (weight.ndim - 1))
        weight.data += (0.1 * noise * fall).to(weight.dtype)
    return model


@pytest.mark.parametrize(("name", "rank"), [("strided", 3), ("pointwise", 5), ("grouped", 1), ("head", 2)])
def test_what_a_rank_leaves_is_the_tail_of_the_singular_values(name, rank):
    base = net()
    target = perturbed(base, [name])
    groups = getattr(getattr(base, name), "groups", 1)
    spec = Spec(rules=[Rule(name, "lora", rank=rank * groups, alpha=5.0)])
    (layer,) = convpeft.extract(base, target, spec=spec).layers
    change = (getattr(target, name).weight - getattr(base, name).weight).detach().numpy()
    blocks = np.split(change.reshape(change.shape[0], -1), groups)
    values = [np.linalg.svd(block, compute_uv=False) for block in blocks]
    tail = math.sqrt(sum(float((each[rank:] ** 2).sum()) for each in values))
    assert layer.rank == rank
    assert layer.left == pytest.approx(tail, rel=1e-10)
    assert layer.change == pytest.approx(float(np.linalg.norm(change)), rel=1e-10)
    x = torch.randn(
        2, *({"head": (8,)}.get(name, (getattr(base, name).weight.shape[1] * groups, 9, 9))), dtype=torch.float64
    )
    merged = convpeft.merge(base)
    close(getattr(base, name)(x), getattr(merged, name)(x))


def test_a_budget_is_kept_and_spent_where_it_counts():
    base, names = net(), ["strided", "pointwise", "grouped", "head"]
    target = perturbed(base, names)
    left = []
    for budget in (400, 800, 1600):
        report = convpeft.extract(base, target, budget=budget, name=f"b{budget}")
        assert 0.5 * budget < report.parameters <= budget
        left.append(report.left)
    assert 1 > left[0] > left[1] > left[2] > 0
    share = convpeft.extract(base, target, budget=0.1, name="share")
    assert share.parameters <= 0.1 * share.plan.base_parameters
    assert str(share).startswith("Net: 4 modules differ; ")


def test_energy_is_what_is_kept_of_the_squared_change():
    base = net()
    target = perturbed(base, ["strided", "pointwise"])
    reports = {e: convpeft.extract(base, target, energy=e, name=f"e{int(100 * e)}") for e in (0.5, 0.9)}
    for energy, report in reports.items():
        assert report.left**2 <= 1 - energy
    assert reports[0.5].parameters < reports[0.9].parameters
    assert reports[0.5].left ** 2 > 0.1  # no more than was asked for, by one rank of one layer


def test_a_greedy_choice_is_the_best_one_where_units_cost_the_same():
    generator = np.random.default_rng(0)
    energies = {name: sorted(generator.random(4), reverse=True) for name in "abc"}
    costs = {name: Costs(values, 10, 0.0, 0, 10**6) for name, values in energies.items()}
    for units in range(13):
        chosen = allocate(costs, budget=10 * units)
        kept = sum(sum(energies[name][: choice.rank]) for name, choice in chosen.items())
        best = sum(sorted((value for values in energies.values() for value in values), reverse=True)[:units])
        assert kept == pytest.approx(best)


def test_ranks_that_cost_as_much_as_the_layer_become_the_layer():
    assert allocate({"a": Costs([4.0, 3.0, 2.0], 10, 0.0, 0, 25)}) == {"a": Choice(0, True)}
    assert allocate({"a": Costs([4.0, 3.0, 2.0], 10, 0.0, 0, 25)}, budget=24) == {"a": Choice(2, False)}
    assert allocate({"a": Costs([0.0], 10, 9.0, 5, 100), "b": Costs([5.0], 10, 0.0, 0, 100)}, budget=14) == {
        "a": Choice(0), "b": Choice(1)
    }  # fmt: skip


def test_batches_weight_the_channels_that_carry_something():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(16, 32, 1)).double().eval()
    target = copy.deepcopy(base)
    target[0].weight.data += 0.1 * torch.randn(
        32, 16, 1, 1, dtype=torch.float64
    )  # no direction counts more than others
    loud = torch.logspace(0, -2, 16, dtype=torch.float64).view(1, -1, 1, 1)
    batches = [torch.randn(2, 16, 8, 8, dtype=torch.float64) * loud for _ in range(3)]
    spec = Spec(rules=[Rule("0", "lora", rank=4)])
    errors = []
    for given in (None, batches):
        model = copy.deepcopy(base)
        report = convpeft.extract(model, target, spec=spec, batches=given)
        assert report.unreached == ()
        errors.append(float((model(batches[0]) - target(batches[0])).detach().norm()))
    assert errors[1] < 0.6 * errors[0]


def test_layers_that_batches_do_not_reach_are_named():
    base = net()
    base.spare = nn.Conv2d(16, 16, 3).double()
    target = perturbed(base, ["strided", "spare"])
    report = convpeft.extract(base, target, energy=0.5, batches=[image()])
    assert report.unreached == ("spare",)
    assert "never reached by the batches, so not weighted: spare" in str(report)


@pytest.mark.parametrize(
    ("options", "change", "error", "match"),
    [
        ({}, None, OptionError, "takes one of spec=, budget= and energy=, not none"),
        ({"budget": 5, "energy": 0.5}, None, OptionError, "not budget and energy"),
        ({"energy": 1.5}, None, OptionError, "energy must be a number above 0 and at most 1, not 1.5"),
        ({"budget": 10}, None, convpeft.SpecError, r"a budget of 10 parameters is too small: \d+ are in modules"),
        ({"energy": 1.0}, lambda d: d.pop("head.weight"), convpeft.SpecError, "head.weight is missing in it"),
        ({"energy": 1.0}, lambda d: d.update(extra=torch.ones(1)), convpeft.SpecError, "extra is not in the base"),
        ({"energy": 1.0}, lambda d: d.update(scale=torch.ones(3)), convpeft.SpecError, r"scale is \(3,\) in it"),
        ({"energy": 1.0}, lambda d: d.update(scale=d["scale"] / 0), convpeft.SpecError, "scale is not finite"),
        (
            {"spec": {"rules": [{"match": "head", "kind": "lora", "dora": True}]}},
            None,
            convpeft.SpecError,
            "plain lora",
        ),
        ({"energy": 1.0, "batches": [torch.ones(3)]}, None, convpeft.HostError, "does not run on batch 1"),
    ],
)
def test_what_cannot_be_extracted_is_refused_and_nothing_changes(options, change, error, match):
    base = net()
    state = fine_tuned(base).state_dict()
    if change is not None:
        change(state)
    before = base(image())
    with pytest.raises(error, match=match):
        convpeft.extract(base, state, **options)
    assert type(base) is Net
    assert torch.equal(base(image()), before)


def test_models_that_do_not_differ_or_have_adapters_are_refused():
    base = net()
    with pytest.raises(convpeft.SpecError, match="do not differ"):
        convpeft.extract(base, net(), energy=0.5)
    other = net()
    convpeft.inject(other, Spec(rules=[Rule("head", "lora", rank=2)]))
    with pytest.raises(convpeft.StateError, match="has adapters of convpeft: merge or eject"):
        convpeft.extract(base, other, energy=0.5)


def test_a_fine_tuned_convnext_becomes_an_adapter_beside_others():
    torch.manual_seed(0)
    base = timm.create_model("convnext_atto", pretrained=False, num_classes=4, drop_path_rate=0.0)
    tuned = copy.deepcopy(base).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(tuned(x), torch.tensor([0, 3])).backward()
        optimizer.step()
    base.eval(), tuned.eval()
    convpeft.inject(base, Spec(rules=[Rule("head.fc", "lora", rank=2)]), name="first")
    with convpeft.disabled(base):
        bare = base(x)
    distance = float((tuned(x) - bare).detach().norm())
    errors = []
    for budget in (0.05, 0.25):
        report = convpeft.extract(base, tuned, budget=budget, name=f"tuned{int(100 * budget)}")
        assert report.parameters <= budget * report.plan.base_parameters
        errors.append(float((base(x) - tuned(x)).detach().norm()) / distance)
    assert errors[1] < errors[0] < 0.5
    plain = convpeft.merge(base)
    torch.testing.assert_close(plain(x), base(x), rtol=1e-4, atol=1e-4)
    with convpeft.disabled(base):
        assert torch.equal(base(x), bare)
