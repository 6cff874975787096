"""``moe_rep_mona``: top-k gates, the load-balancing loss and its lifetime, and the host's own grid."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft.adapters import MoeRepMona, Site
from convpeft.adapters.gating import Router
from convpeft.convolution.geometry import ConvGeometry, output_geometry
from tests.cases import CASES, Variant, adapted, assert_relative, named, net
from tests.references import convolution as reference
from tests.references import visual

SIZES = [1, 3, 5, 7]


def balanced(place: str = "parallel", **options) -> nn.Module:
    """Return a net with a random, load-balanced adapter, in training mode."""
    variant = Variant("moe_rep_mona", place, {"rank": 4, "load_balancing": 0.5, **options})
    return adapted(CASES["3x3"], variant).train()


def moe(groups: int = 1, **options) -> MoeRepMona:
    """Return a random adapter beside a 3x3 layer of 8 channels, in float64."""
    geometry = ConvGeometry(8, 8, (3, 3), padding=(1, 1, 1, 1), groups=groups)
    made = MoeRepMona(Site("parallel", geometry), MoeRepMona.Options(**options)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.5)
    return made


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["3x3", "stride2", "groups2", "dilation2", "reflect", "tf-same-stride2"])
@torch.no_grad()
def test_every_number_of_experts_is_the_formula(name, top_k):
    case = CASES[name]
    options = {"rank": 4, "kernel_sizes": SIZES, "top_k": top_k, "spatial_attention": True}
    layer, x = adapted(case, Variant("moe_rep_mona", "parallel", options)).layer, case.input()
    expected = visual.moe_rep_mona(x, layer.convpeft.a, reference.grid_of(layer, x), layer.groups, top_k)
    assert_relative(layer.convpeft.a(x), expected)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_gates_are_those_of_the_chosen_renormalised(groups):
    router = Router(8, 4, 2, groups).double()
    x = torch.randn(16, 8, 5, 5, dtype=torch.float64) * 5
    gates, probabilities = router(x)
    assert gates.shape == (16, groups, 4)
    for ours, expected in zip((gates, probabilities), visual.route(x, router, groups, 2), strict=True):
        assert_relative(ours, expected)
    assert torch.equal((gates > 0).sum(-1), torch.full((16, groups), 2))
    assert_relative(gates.sum(-1), torch.ones(16, groups, dtype=torch.float64))
    assert len({tuple(row) for row in (gates[:, 0] > 0).tolist()}) > 1  # images choose for themselves


def test_one_expert_alone_still_teaches_the_router():
    made = moe(top_k=1)
    made(torch.randn(4, 8, 6, 6, dtype=torch.float64)).square().sum().backward()
    assert made.router.score.weight.grad.abs().max() > 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_parameter_has_a_gradient_whatever_was_chosen(top_k):
    made = moe(top_k=top_k)
    made(torch.randn(1, 8, 6, 6, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())  # DDP without find_unused_parameters
    still = [expert.weight.grad.abs().max() == 0 for expert in made.experts]
    assert sum(still) == 3 - top_k


def test_gradients_are_those_of_the_function():
    made = moe(groups=2, rank=4, kernel_sizes=(1, 3), spatial_attention=True)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, (x,))


def test_parameters_are_few_and_counted():
    made = MoeRepMona(Site("output", output_geometry(512, False)), MoeRepMona.Options())
    router, experts, squeeze = 512 * 3 + 3, 16 * (9 + 25 + 49), 16 * 4 + 4 + 4 * 16 + 16
    assert sum(p.numel() for p in made.parameters()) == 2 * 512 * 16 + router + experts + squeeze


class TestLoadBalancing:
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_it_is_switchs_loss(self, top_k):
        model = balanced(kernel_sizes=[1, 3, 5], top_k=top_k)
        x = CASES["3x3"].input()
        model(x)
        gates, probabilities = visual.route(model.stem(x), model.layer.convpeft.a.router, 1, top_k)
        shares = [float((gates[:, 0, k] > 0).sum()) / (len(x) * top_k) for k in range(3)]
        expected = 0.5 * 3 * sum(shares[k] * probabilities[:, 0, k].mean() for k in range(3))
        assert_relative(convpeft.auxiliary_loss(model).detach().double(), expected.detach(), 1e-6)
        assert_relative(model.layer.convpeft.a.auxiliary_loss().detach(), expected.detach())

    def test_it_is_smallest_when_all_are_used_alike(self):
        made = moe(load_balancing=1.0, top_k=3)
        with torch.no_grad():
            made.router.score.weight.zero_()
            made.router.score.bias.zero_()
        made(torch.randn(2, 8, 4, 4, dtype=torch.float64))
        assert_relative(made.auxiliary_loss().detach(), torch.tensor(1.0, dtype=torch.float64))

    def test_descending_it_spreads_the_choices(self):
        made = moe(load_balancing=1.0, top_k=1)
        with torch.no_grad():
            made.router.score.weight.mul_(0.1)
            made.router.score.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
        x = torch.randn(32, 8, 4, 4, dtype=torch.float64)
        losses = []
        optimizer = torch.optim.SGD(made.router.parameters(), lr=0.5)
        for _ in range(40):
            optimizer.zero_grad()
            made(x)
            losses.append(made.auxiliary_loss())
            losses[-1].backward()
            optimizer.step()
        assert float(losses[0].detach()) > 2
        assert float(losses[-1].detach()) < 1.4

    def test_its_gradient_reaches_the_router_alone(self):
        model = balanced()
        model(CASES["3x3"].input())
        convpeft.auxiliary_loss(model).backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == {"layer.convpeft.a.router.score.weight", "layer.convpeft.a.router.score.bias"}

    def test_every_active_adapter_adds_its_own(self):
        options = {"rank": 2, "load_balancing": 0.5}
        kinds = [Variant("moe_rep_mona", place, options) for place in ("parallel", "output")]
        model = adapted(CASES["3x3"], *kinds).train()
        model(CASES["3x3"].input())
        parts = [model.layer.convpeft._modules[name].auxiliary_loss() for name in "ab"]
        assert_relative(convpeft.auxiliary_loss(model).detach().double(), sum(parts).detach(), 1e-6)
        convpeft.set_active(model, "b")
        assert_relative(convpeft.auxiliary_loss(model).detach().double(), parts[1].detach(), 1e-6)

    def test_off_in_eval_and_without_gradients_it_is_not_even_computed(self, monkeypatch):
        counted = []
        whole = torch.Tensor.mean
        monkeypatch.setattr(torch.Tensor, "mean", lambda *a, **k: counted.append(1) or whole(*a, **k))
        x = CASES["3x3"].input()

        def means(model: nn.Module) -> int:
            counted.clear()
            model(x)
            return len(counted)

        off = means(balanced(load_balancing=0.0))
        model = balanced()
        assert means(model) == off + 2
        with torch.no_grad():
            assert means(model) == off
        assert model.layer.convpeft.a.auxiliary_loss() is None
        assert means(model.eval()) == off
        assert model.layer.convpeft.a.auxiliary_loss() is None
        assert float(convpeft.auxiliary_loss(model)) == 0

    @pytest.mark.parametrize("event", ["eval", "train", "eval forward", "no_grad forward", "next forward"])
    def test_a_loss_nobody_used_is_let_go_with_its_graph(self, event):
        model, x = balanced(), CASES["3x3"].input()
        model(x)
        first = weakref.ref(model.layer.convpeft.a.auxiliary_loss())
        assert first() is not None
        if event == "eval":
            model.eval()
        elif event == "train":
            model.train()
        elif event == "eval forward":
            model.layer.convpeft.a.training = False
            model(x)
        elif event == "no_grad forward":
            with torch.no_grad():
                model(x)
        else:
            model(x)
        gc.collect()
        assert first() is None

    def test_a_pending_loss_is_no_hindrance_to_copies(self):
        model, x = balanced(), CASES["3x3"].input()
        model(x)
        pending = model.layer.convpeft.a.auxiliary_loss()
        assert pending.grad_fn is not None
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copied, torch.load(file, weights_only=False)):
            assert other.layer.convpeft.a.auxiliary_loss() is None
            assert torch.equal(other.eval()(x), copy.deepcopy(model).eval()(x))
        assert model.layer.convpeft.a.auxiliary_loss() is pending

    def test_an_empty_batch_has_no_loss(self):
        model = balanced()
        model.layer(torch.zeros(0, 4, 9, 8).double())
        assert model.layer.convpeft.a.auxiliary_loss() is None

    def test_checkpointing_gives_the_same_gradients_and_keeps_nothing(self):
        model, x = balanced(), CASES["3x3"].input().requires_grad_()

        def gradients(through) -> list[torch.Tensor]:
            model.zero_grad()
            loss = through(x).square().sum() + convpeft.auxiliary_loss(model)
            pending = model.layer.convpeft.a.auxiliary_loss()
            loss.backward()
            assert model.layer.convpeft.a.auxiliary_loss() is pending  # not the recomputed one, with its graph
            return [p.grad.clone() for p in model.parameters() if p.requires_grad]

        plain = gradients(model)
        again = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
        for got, expected in zip(again, plain, strict=True):
            assert_relative(got, expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 0}, "top_k must be above 0, not 0"),
        ({"top_k": 4}, "top_k 4 is more than the 3 experts of kernel_sizes"),
        ({"kernel_sizes": [3]}, "top_k 2 is more than the 1 experts of kernel_sizes"),
        ({"kernel_sizes": [3, 4]}, "kernel_sizes must be odd and at least 1 .*, not 4"),
        ({"load_balancing": -0.1}, r"load_balancing must be 0 \(off\) or above, not -0\.1"),
        ({"squeeze": 0}, "squeeze must be above 0, not 0"),
        ({"spatial_attention": 1}, "spatial_attention of kind 'moe_rep_mona' must be true or false, not 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, text):
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.plan(net(CASES["3x3"]), {"rules": [{"match": "layer", "kind": "moe_rep_mona", **options}]})


@pytest.mark.parametrize("case", named([CASES["3x3"], CASES["groups2"]]))
def test_a_merge_is_refused_and_its_experts_stay(case):
    model, x = adapted(case, Variant("moe_rep_mona", "parallel", {"rank": 4})), case.input()
    with pytest.raises(
        convpeft.MergeError, match="layer: its gates and its squeeze-and-excitation depend on the input"
    ):
        convpeft.merge(model)
    kept = convpeft.merge(model, strict=False)
    assert torch.equal(kept(x), model(x))
    assert len(kept.layer.convpeft.a.experts) == 3
