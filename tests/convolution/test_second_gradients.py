"""Gradients of gradients, batches of gradients and ``vmap``: what torch's own operations give, in every form."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convpeft
from convpeft.convolution import nodes
from tests.cases import assert_relative, randomised

RULES: dict[str, dict[str, Any]] = {
    **{form: {"kind": "lora", "rank": 2, "evaluate": form} for form in ("separate", "summed", "weight")},
    "pointwise": {"kind": "lora", "rank": 2, "pointwise": True, "alpha": 3},
    "rep_mona": {"kind": "rep_mona", "rank": 2, "kernel_sizes": [3]},
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": lambda: nn.GELU("tanh"),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "tanh": nn.Tanh,
}


def net(rule: dict[str, Any], act: Callable[[], nn.Module] = nn.SiLU, lean: bool = True) -> nn.Sequential:
    """Return a frozen layer, a norm, an activation and two layers, with adapters on the layers."""
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        act(),
        nn.Conv2d(4, 6, 3, padding=1),
        act(),
        nn.Conv2d(6, 4, 1),
    ]
    model = nn.Sequential(*parts).double().train()
    convpeft.inject(model, {"rules": [{"match": "**", "only": "Conv2d", **rule}]}, lean=lean)
    return randomised(model)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def agree(ask: Callable[[nn.Sequential, Tensor], Any], rule: str, act: str = "silu") -> None:
    """Assert that ``ask(model, images)`` gives what torch's own operations give, with ``lean`` and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "is_eager", lambda: False)
        expected = ask(net(RULES[rule], ACTIVATIONS[act]), images())
    for lean in (True, False):
        got = ask(net(RULES[rule], ACTIVATIONS[act], lean), images())
        for right, found in zip(expected, got, strict=True):
            assert (right is None) == (found is None)
            if right is not None:
                assert_relative(found, right, 1e-10)


def asked(output: Tensor, wanted: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of the squared gradients of the squared output."""
    first = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted, allow_unused=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("rule", RULES)
class TestSecondGradients:
    def test_of_everything(self, rule, act):
        agree(lambda model, x: asked(model(x), [x, *trained(model)]), rule, act)

    def test_at_the_map_that_an_activation_made(self, rule, act):
        def ask(model, x):
            y = model[:3](x)
            return asked(model[3:](y), [y, x, *trained(model)])

        agree(ask, rule, act)


@pytest.mark.parametrize("rule", RULES)
class TestOtherSecondGradients:
    def test_at_a_map_that_was_written_to_since(self, rule):
        """Its name means another tensor then, in autograd's eyes too."""

        def ask(model, x):
            y = model[:3](x)
            output = model[3:](y * 1)
            y.mul_(2)
            return asked(output, [x, *trained(model)])

        agree(ask, rule)

    def test_of_a_map_that_a_hook_scales(self, rule):
        def ask(model, x):
            y = model[:3](x)
            y.register_hook(lambda grad: 3 * grad)
            output = model[3:](y)
            del y
            return asked(output, [x, *trained(model)])

        agree(ask, rule)

    @pytest.mark.parametrize("frozen", ["down", "up"])
    def test_with_one_factor_frozen(self, rule, frozen):
        def ask(model, x):
            for name, parameter in model.named_parameters():
                if name.endswith(frozen):
                    parameter.requires_grad_(False)
            return asked(model(x), [x, *trained(model)])

        agree(ask, rule)

    def test_inside_using_where_nothing_trains(self, rule):
        def ask(model, x):
            with convpeft.using(model, "default"):
                return asked(model(x), [x])

        agree(ask, rule)

    def test_of_parameters_alone(self, rule):
        agree(lambda model, x: asked(model(x.detach()), trained(model)), rule)

    def test_third_gradients(self, rule):
        def ask(model, x):
            (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
            return torch.autograd.grad(second.square().sum(), [x, *trained(model)], allow_unused=True)

        agree(ask, rule)


@pytest.mark.parametrize("rule", RULES)
class TestBatchesOfGradients:
    def test_of_autograd(self, rule):
        def ask(model, x):
            output = model(x).reshape(-1)[:5]
            eye = torch.eye(5, dtype=torch.float64)
            return torch.autograd.grad(output, [x, *trained(model)], eye, is_grads_batched=True)

        agree(ask, rule)

    def test_a_vectorised_jacobian_and_hessian(self, rule):
        def ask(model, x):
            functional = torch.autograd.functional
            jacobian = functional.jacobian(lambda x: model(x).flatten()[:5], x, vectorize=True)
            small = x[:1, :, :3, :3].detach()
            return jacobian, functional.hessian(lambda x: model(x).square().sum(), small, vectorize=True)

        agree(ask, rule)

    def test_vmap_over_autograd(self, rule):
        def ask(model, x):
            output = model(x).reshape(-1)[:4]
            one = lambda v: torch.autograd.grad(output, [x, *trained(model)], v, retain_graph=True)  # noqa: E731
            return torch.func.vmap(one)(torch.eye(4, dtype=torch.float64))

        agree(ask, rule)

    def test_batches_that_are_differentiated_again(self, rule):
        def ask(model, x):
            output, wanted = model(x).reshape(-1)[:3], [x, *trained(model)]
            eye = torch.eye(3, dtype=torch.float64)
            first = torch.autograd.grad(output, wanted, eye, is_grads_batched=True, create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted, allow_unused=True)

        agree(ask, rule)

    def test_jacobians_of_functorch(self, rule):
        def ask(model, x):
            return [
                make(lambda x: model(x).flatten()[:3])(x.detach()) for make in (torch.func.jacrev, torch.func.jacfwd)
            ]

        agree(ask, rule)


def test_backward_within_autocast_computes_in_the_forward_passs_dtype():
    found = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model = net(RULES["summed"]).float()
        loss = model(images().float()).square().sum()
        with context:
            loss.backward()
        found.append([parameter.grad for parameter in trained(model)])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_a_recomputed_input_is_freed():
    """The node refers to it weakly: it is there for second gradients only while somebody else holds it."""
    model, x = net(RULES["summed"]), images()
    y = model[:3](x)
    output, held = model[3:](y), weakref.ref(y)
    del y
    gc.collect()
    assert held() is None
    output.sum().backward()


@pytest.mark.parametrize("function", [F.silu, F.mish])
def test_gradgradcheck_of_a_trained_convolution_of_a_map(function):
    geometry = convpeft.ConvGeometry(3, 4, (3, 3), padding=(1, 1, 1, 1))
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    run = lambda x, weight: nodes.convolve_trained(geometry, function(x * 2), weight)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, weight))
    assert torch.autograd.gradgradcheck(run, (x, weight))
