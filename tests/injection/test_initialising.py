"""Fresh adapters read chosen directions, and no output changes by it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convpeft
from convpeft.injection.directions import KernelGradients, kernel_gradient
from tests.cases import CONVS
from tests.detector import LORA, Untouched, detector, images

RULES = [
    {"match": "stem.conv", "kind": "lora", "rank": 3},
    {"match": "body.0.conv", "kind": "rep_mona", "rank": 2},
    {"match": "body.1.conv", "kind": "lora", "rank": 4},
    {"match": "neck.0", "kind": "lora", "rank": 2, "place": "output"},
    {"match": "box", "kind": "lora", "rank": 2, "pointwise": True},
    {"match": "score", "kind": "lora", "rank": 2},
]
METHODS = ("kaiming", "orthogonal", "eva", "gradient")


def loss(model, x):
    return model(x).square().sum()


def downs(model, name="default"):
    return {layer: adapter.down for layer, adapter in convpeft.AdaptedModel.of(model).adapters(name)}


def same_space(rows: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare the spaces that two sets of rows span."""
    projections = [basis.T @ basis for basis in (torch.linalg.qr(each.double().T)[0].T for each in (rows, wanted))]
    torch.testing.assert_close(*projections, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CONVS, ids=lambda case: case.name)
def test_kernel_gradient_is_that_of_the_layer(case):
    layer, x = case.build().double(), case.input()
    y = layer(x)
    gradient = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, layer.weight, gradient)
    geometry = convpeft.ConvGeometry.of(layer)
    torch.testing.assert_close(kernel_gradient(geometry, x, gradient), wanted.float())


@pytest.mark.parametrize("method", METHODS)
class TestAllMethods:
    def test_no_output_changes_and_the_seed_decides(self, method):
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(5)
            model, x = detector(), images()
            convpeft.inject(model, {"rules": RULES})
            before, own = Untouched(model), model(x)
            old = {layer: down.detach().clone() for layer, down in downs(model).items()}
            report = convpeft.initialise(
                model, [images(4), images(3)], method=method, loss=loss, seed=seed, progress=False
            )
            assert torch.equal(model(x), own)
            assert set(report.changed) == {f"{layer}: default" for layer in old}
            now = {layer: down.detach().clone() for layer, down in downs(model).items()}
            assert all(not torch.equal(now[layer], old[layer]) for layer in old)
            assert not any(p.grad is not None for p in model.parameters())
            with torch.no_grad():
                for layer, down in downs(model).items():
                    down.copy_(old[layer])
            before.check()
            found.append(now)
        assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])

    def test_rows_are_as_long_as_kaimings(self, method):
        model = detector()
        convpeft.inject(model, {"rules": RULES})
        convpeft.initialise(model, [images(4)], method=method, loss=loss, progress=False)
        for layer in ("stem.conv", "body.0.conv", "body.1.conv"):
            squares = downs(model)[layer].detach().flatten(1).square().sum(1)
            assert squares.mean().item() == pytest.approx(1 / 3, rel=0.5 if method == "kaiming" else 1e-6), layer

    def test_what_trained_is_refused(self, method):
        model = detector()
        convpeft.inject(model, {"rules": [LORA]})
        with torch.no_grad():
            model.body[0].conv.convpeft.default.up[0, 0] = 1
        before = Untouched(model)
        with pytest.raises(convpeft.StateError, match=r"body\.0\.conv: default trained already"):
            convpeft.initialise(model, [images()], method=method, loss=loss, progress=False)
        before.check()


def test_gradient_takes_the_directions_of_the_kernels_gradient():
    model, batches = detector(), [images(4), images(3)]
    copied = detector()
    copied.load_state_dict(model.state_dict())
    sum(loss(copied, x) for x in batches).backward()
    convpeft.inject(model, {"rules": RULES})
    convpeft.initialise(model, batches, loss=loss, progress=False)
    found = downs(model)
    wanted = torch.linalg.svd(copied.stem.conv.weight.grad.flatten(1))[2][:3]
    same_space(found["stem.conv"].detach().flatten(1), wanted)
    pixels = (
        copied.body[0].conv.weight.grad.permute(0, 2, 3, 1).flatten(0, 2)
    )  # one filter over channels for all pixels
    same_space(found["body.0.conv"].detach().flatten(1), torch.linalg.svd(pixels)[2][:2])
    groups = copied.body[1].conv.weight.grad.unflatten(0, (2, 4)).flatten(2)
    for group, rows in zip(groups, found["body.1.conv"].detach().unflatten(0, (2, 2)).flatten(2), strict=True):
        same_space(rows, torch.linalg.svd(group)[2][:2])
    first = torch.linalg.svd(copied.score.weight.grad)[2][:1]  # in float32 it has rank 1
    same_space(found["score"].detach().flatten(1)[:1], first)


def test_eva_takes_the_main_directions_of_the_patches():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1, stride=2)
    model = nn.Sequential(layer).double()
    mixing = torch.randn(6, 6, dtype=torch.float64) * torch.tensor([10.0, 3, 1, 0.1, 0.1, 0.1], dtype=torch.float64)
    batches = [torch.einsum("ij,njhw->nihw", mixing, torch.randn(4, 6, 10, 10, dtype=torch.float64)) for _ in range(3)]
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2, "pointwise": True}]})
    convpeft.initialise(model, batches, method="eva", progress=False)
    centres = torch.cat([x[:, :, ::2, ::2].transpose(0, 1).flatten(1).T for x in batches])
    wanted = torch.linalg.svd(centres, full_matrices=False)[2][:2]
    same_space(downs(model)["0"].detach().flatten(1), wanted, 0.05)
    convpeft.eject(model)
    convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 4}]})
    convpeft.initialise(model, batches, method="eva", progress=False)
    patches = torch.cat([F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1) for x in batches])
    rows = downs(model)["0"].detach().flatten(1) * 3**0.5
    energy = (patches @ rows.T).square().sum()
    best = torch.linalg.svdvals(patches)[:4].square().sum()
    assert 0.85 * best < energy <= best * (1 + 1e-6)


def test_a_better_start_learns_faster():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).double()
    teacher = nn.Conv2d(16, 16, 3, padding=1).double()
    change = 0.2 * torch.outer(torch.randn(16), torch.randn(144)).double()
    with torch.no_grad():
        teacher.weight.copy_(model[0].weight + change.view(16, 16, 3, 3))
        teacher.bias.copy_(model[0].bias)
    batches = [torch.randn(4, 16, 8, 8, dtype=torch.float64) for _ in range(8)]

    def distance(model, x):
        return (model(x) - teacher(x)).square().mean()

    last = {}
    for method in ("kaiming", "gradient"):
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 1}]})
        convpeft.initialise(model, batches, method=method, loss=distance, progress=False)
        optimizer = torch.optim.Adam(convpeft.param_groups(model, lr=0.05))
        for x in batches:
            optimizer.zero_grad()
            value = distance(model, x)
            value.backward()
            optimizer.step()
        last[method] = value.item()
        convpeft.eject(model)
    assert last["gradient"] < 0.8 * last["kaiming"]


def test_kinds_without_directions_and_layers_that_did_not_run_are_named():
    model = detector()
    rules = [LORA, {"match": "neck", "kind": "bottleneck"}, {"match": "score", "kind": "lora"}]
    convpeft.inject(model, {"rules": rules})
    report = convpeft.initialise(
        model, [images()], method="eva", run=lambda model, x: model.body[0](model.stem(x)), progress=False
    )
    assert report.changed == ("body.0.conv: default",)
    assert set(report.left) == {"neck: default", "body.1.conv: default", "score: default"}
    assert "kinds without such directions: neck: default" in str(report)
    assert "did not run and keep theirs: body.1.conv: default, score: default" in str(report)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"method": "pca"},
            convpeft.OptionError,
            "method must be one of kaiming, orthogonal, eva, gradient, not 'pca'",
        ),
        ({}, convpeft.StateError, "needs loss="),
        (
            {"loss": lambda model, x: model(x)},
            convpeft.StateError,
            r"has to return one number.*Tensor of shape \(2, 4\)",
        ),
        (
            {"loss": lambda model, x: model(x).sum() * torch.inf},
            convpeft.StateError,
            "the loss is -?inf|the loss is nan",
        ),
        ({"loss": lambda model, x: x.sum()}, convpeft.StateError, "depends on what trains"),
        ({"method": "eva", "run": lambda model, x: None}, convpeft.StateError, "none of the 2 adapters ran"),
    ],
    ids=["method", "no loss", "no scalar", "infinite", "without graph", "not run"],
)
def test_refusals(options, error, text):
    model = detector()
    convpeft.inject(model, {"rules": [LORA]})
    before = Untouched(model)
    with pytest.raises(error, match=text):
        convpeft.initialise(model, [images()], progress=False, **options)
    before.check()


def test_half_without_gradient_is_told():
    assert KernelGradients(convpeft.ConvGeometry(3, 4)).whole is None
