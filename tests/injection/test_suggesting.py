"""suggest spends its budget where a few batches say that it pays, touches nothing, and beats uniform rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from benchmarks.detectors.zoo import FAMILIES
from convpeft.injection.suggesting import _gains, _hull, _spend
from convpeft.injection.suggestion import Choice, Layer
from tests.detector import Untouched, detector, images


def loss(model, x):
    return model(x).square().sum()


def teacher_and_student():
    """Return a frozen network, one that differs from it in two layers by low-rank updates, and the distance of the two."""
    torch.manual_seed(0)
    sizes = [(3, 16, 3), (16, 16, 3), (16, 24, 1), (24, 24, 3), (24, 16, 3), (16, 8, 1)]
    student = nn.Sequential(
        *[layer for i, o, k in sizes for layer in (nn.Conv2d(i, o, k, padding=k // 2), nn.SiLU())]
    ).double()
    teacher = nn.Sequential(
        *[layer for i, o, k in sizes for layer in (nn.Conv2d(i, o, k, padding=k // 2), nn.SiLU())]
    ).double()
    teacher.load_state_dict(student.state_dict())
    with torch.no_grad():
        for number, rank in ((2, 3), (6, 1)):
            weight = teacher[number].weight
            update = torch.randn(len(weight), rank).double() @ torch.randn(rank, weight[0].numel()).double()
            weight += 0.2 * update.view_as(weight)

    def distance(model, x):
        return (model(x) - teacher(x)).square().mean()

    return student, distance


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 10, 10, generator=generator, dtype=torch.float64) for _ in range(count)]


def learnt(model, spec, distance) -> float:
    """Return the distance after some steps with a spec; the model is as before."""
    torch.manual_seed(0)
    convpeft.inject(model, spec)
    optimizer = torch.optim.Adam(convpeft.param_groups(model, lr=3e-3))
    for x in batches(40, seed=1):
        optimizer.zero_grad()
        distance(model, x).backward()
        optimizer.step()
    found = distance(model, batches(1, seed=2)[0]).item()
    convpeft.eject(model)
    return found


class TestSuggest:
    def test_it_keeps_the_budget_and_leaves_the_model_as_it_was(self):
        model = detector()
        model.neck.train()
        before, data = Untouched(model), [images(8) for _ in range(4)]
        state = torch.random.get_rng_state()
        found = convpeft.suggest(model, data, loss, budget=0.3, progress=False)
        before.check()
        assert torch.equal(state, torch.random.get_rng_state())
        plan = convpeft.plan(model, found.spec)
        assert plan.trainable_parameters == found.parameters <= 0.3 * plan.base_parameters
        assert all(layer.merge_refusal is None for layer in plan.layers)
        assert found.spec.norm in ("adapt", "frozen")

    def test_the_same_seed_gives_the_same_spec(self):
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Dropout(0.5), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))
        data = [torch.randn(4, 3, 9, 9) for _ in range(4)]
        found = [convpeft.suggest(model, data, loss, budget=0.1, seed=seed, progress=False) for seed in (0, 0, 1)]
        assert found[0].spec == found[1].spec
        assert str(found[0]) == str(found[1]) != str(found[2])

    def test_it_beats_uniform_rank_where_half_of_the_layers_do_not_matter(self):
        student, distance = teacher_and_student()
        model = nn.ModuleDict({"used": student, "unused": teacher_and_student()[0]})

        def of_one(model, x):
            return distance(model["used"], x) + 0 * model["unused"](x).sum()

        uniform = {"rules": [{"match": "**", "kind": "lora", "rank": 1, "up_mult": 4}]}
        plan = convpeft.plan(model, uniform)
        budget = plan.trainable_parameters / plan.base_parameters
        found = convpeft.suggest(model, batches(6), of_one, budget=budget, progress=False)
        assert found.parameters <= plan.trainable_parameters
        names = {layer.name for layer in convpeft.plan(model, found.spec).layers}
        assert names
        assert all(name.startswith("used.") for name in names)
        assert learnt(model, found.spec, of_one) < 0.95 * learnt(model, uniform, of_one)

    def test_small_batches_get_affine_and_large_ones_adapt(self):
        for size, norm in ((2, "affine"), (8, "adapt")):
            found = convpeft.suggest(detector(), [images(size) for _ in range(4)], loss, budget=0.9, progress=False)
            assert (found.norms is None) == (found.spec.norm == "frozen")
            assert found.spec.norm in (norm, "frozen")

    def test_report_and_picture(self, tmp_path):
        student, distance = teacher_and_student()
        found = convpeft.suggest(student, batches(4), distance, budget=0.1, progress=False)
        text = str(found)
        assert text.startswith(
            f"{sum(c is not None for c in found.chosen)} of 6 layers; {found.parameters:,} parameters = "
        )
        assert "more multiply-adds in training" in text
        picture = found.draw(tmp_path / "ranks.svg").read_text()
        assert picture.count("<text transform") == 6
        import xml.etree.ElementTree as tree

        tree.fromstring(picture)

    def test_real_detector_whose_loss_wants_training_mode(self):
        subject = FAMILIES["torchvision-ssdlite"].build()
        images = [subject.images(2, seed=seed) for seed in range(2)]
        before = {key: value.clone() for key, value in subject.model.state_dict().items()}
        found = convpeft.suggest(subject.model.eval(), images, subject.loss, budget=0.025, steps=2, progress=False)
        plan = convpeft.plan(subject.model, found.spec)
        assert 0.02 < plan.trainable_parameters / plan.base_parameters <= 0.025
        assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"budget": 0.0}, convpeft.OptionError, "budget is a share"),
            ({"budget": 2}, convpeft.OptionError, "budget is a share"),
            ({"steps": 1}, convpeft.OptionError, "steps is a whole number of batches of at least 2"),
            ({"batches": [images()]}, convpeft.StateError, "needs 2 batches or more.*not 1"),
            ({"budget": 1e-4}, convpeft.StateError, "too little for any adapter"),
            ({"loss": lambda model, x: model(x)}, convpeft.StateError, "has to return one number"),
        ],
        ids=["no budget", "too much", "one step", "one batch", "tiny", "loss"],
    )
    def test_refusals(self, options, error, text):
        model = detector()
        before = Untouched(model)
        given = {"batches": [images(8) for _ in range(2)], "loss": loss, **options}
        with pytest.raises(error, match=text):
            convpeft.suggest(model, given.pop("batches"), given.pop("loss"), progress=False, **given)
        before.check()

    def test_adapters_are_refused(self):
        model = detector()
        convpeft.inject(model, {"norm": "affine"})
        with pytest.raises(convpeft.StateError, match="measures a model without adapters"):
            convpeft.suggest(model, [images()] * 2, loss, progress=False)


def test_hull_leaves_out_what_is_not_worth_its_parameters():
    choices = [
        Choice("lora", rank, cost, gain)
        for rank, cost, gain in ((1, 10, 5.0), (2, 20, 6.0), (4, 30, 12.0), (8, 60, 11.0))
    ]
    assert [choice.rank for choice in _hull(choices)] == [1, 4]


def test_spending_is_as_good_as_trying_everything():
    torch.manual_seed(0)
    for _ in range(20):
        layers = []
        for _ in range(4):
            costs = torch.randint(1, 10, (3,)).cumsum(0).tolist()
            gains = torch.rand(3).sort(descending=True).values.cumsum(0).tolist()  # concave over equal steps
            layers.append(
                Layer("a", "", 0, [Choice("lora", n, c, g) for n, (c, g) in enumerate(zip(costs, gains, strict=True))])
            )
        budget = 25
        best, ways = 0.0, [[None, *layer.choices] for layer in layers]
        for combination in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist():
            picked = [way[at] for way, at in zip(ways, combination, strict=True)]
            if sum(c.parameters for c in picked if c) <= budget:
                best = max(best, sum(c.gain for c in picked if c))
        chosen = _spend(layers, budget)
        assert sum(c.parameters for c in chosen if c) <= budget
        largest = max(c.gain for layer in layers for c in layer.choices)
        assert best - sum(c.gain for c in chosen if c) <= largest  # the relaxation's bound: one item


def test_noise_gains_nothing():
    torch.manual_seed(0)
    site = convpeft.Site("parallel", convpeft.ConvGeometry(16, 16, (3, 3)))
    even, odd = torch.randn(16, 16, 3, 3), torch.randn(16, 16, 3, 3)
    signal = torch.outer(torch.randn(16), torch.randn(144)).view(16, 16, 3, 3)
    noise, _ = _gains(even, odd, site)
    clear, _ = _gains(even + signal, odd + signal, site)
    assert clear[0] > 4 * noise.max()
    assert noise.sum() < 0.5 * even.abs().sum() / 3**0.5 / 12
