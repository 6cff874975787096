"""A small net with frozen layers and adapters, and what autograd keeps of a pass through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import convpeft
from convpeft.convolution.low_rank import Factors
from tests.cases import randomised

FORMS = ("separate", "summed", "weight")
SEES_HOOKS = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"),
    reason="this torch does not say whether a saved tensor has hooks, so inputs are kept",
)


class Net(nn.Module):
    """Convolutions, norms and an activation, with a branch that is used twice."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.SiLU() if act is None else act
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.body_norm = nn.BatchNorm2d(8)
        self.neck = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.act(self.body_norm(self.body(x)))
        return self.head(self.act(self.neck(self.act(x))))


def net(act: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    model = Net(act).double()
    for norm in (model.norm, model.body_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    return model


LORA = {"rules": [{"match": "**", "kind": "lora", "rank": 2}]}
LATE = {"rules": [{"match": "head", "kind": "lora", "rank": 2}]}


def adapted(spec: dict = LORA, act: nn.Module | None = None, lean: bool = True) -> Net:
    model = net(act)
    convpeft.inject(model, spec, lean=lean)
    return randomised(model)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def factors_for(layer: nn.Conv2d, form: str) -> Factors:
    groups = layer.groups
    generator = torch.Generator().manual_seed(2)
    down = torch.randn(2 * groups, *layer.weight.shape[1:], dtype=torch.float64, generator=generator)
    up = torch.randn(layer.out_channels, 2, 1, 1, dtype=torch.float64, generator=generator)
    return Factors(down.requires_grad_(), up.requires_grad_(), form)
