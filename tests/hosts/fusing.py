"""Blocks with a norm, and the ways in which others fold it: in place, by a new layer, by another forward."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convpeft


class Block(nn.Module):
    """A convolution with a norm, beside a 1x1 one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.skip = nn.Conv2d(4, 4, 1)
        self.deployed = False
        self.texts: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y if self.deployed else self.bn(y)) + self.skip(x)


def folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution and its norm as one."""
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * gain.view(-1, 1, 1, 1), norm.bias - norm.running_mean * gain


def one_conv(block: Any) -> nn.Conv2d:
    weight, bias = folded(block.conv, block.bn)
    made = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    made.weight.data, made.bias.data = weight.data, bias.data  # type: ignore[union-attr]
    return made


def put_in_place(block: Any) -> None:
    block.deployed = True
    block.conv = one_conv(block)
    del block.bn


def deleted_last(block: Any) -> None:
    block.rep = one_conv(block)
    block.forward = types.MethodType(lambda self, x: self.rep(x) + self.skip(x), block)
    del block.bn
    del block.conv


def set_to_none(block: Any) -> None:
    block.rep, block.deployed = one_conv(block), True
    block.add_module("conv", None)


def weight_then_bias(block: Any) -> None:
    block.deployed = True
    block.conv.weight, block.conv.bias = map(nn.Parameter, folded(block.conv, block.bn))
    block.bn = nn.Identity()


def written_in_place(block: Any) -> None:
    weight, bias = folded(block.conv, block.bn)
    block.conv.weight.data.copy_(weight)
    block.skip.bias.data.add_(bias)
    block.bn = nn.Identity()


def pointed_elsewhere(block: Any) -> None:
    weight, bias = folded(block.conv, block.bn)
    block.conv.weight.data, block.skip.bias.data = weight.data, block.skip.bias.data + bias.data
    block.deployed, block.bn = True, None


def through_the_dict(block: Any) -> None:
    block._modules["conv"], block._modules["bn"] = one_conv(block), nn.Identity()


def another_forward(block: Any) -> None:
    block.w, block.b = map(nn.Parameter, folded(block.conv, block.bn))
    block.forward = types.MethodType(lambda self, x: F.conv2d(x, self.w, self.b, padding=1) + self.skip(x), block)


WRONG = {set_to_none}  # leaves a block that cannot run
SEEN_ANYWHERE = [put_in_place, deleted_last, set_to_none, weight_then_bias]
SEEN_IN_A_METHOD = [*SEEN_ANYWHERE, written_in_place, pointed_elsewhere, through_the_dict, another_forward]


def block_class(**methods: Callable[..., Any]) -> type[Block]:
    """Return a subclass of ``Block`` with more methods."""
    return type("Folding", (Block,), methods)


def model_of(blocks: list[nn.Module]) -> nn.Module:
    """Return a model in eval mode whose norms are not the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model


def adapted_model(blocks: list[nn.Module], match: str = "1.conv", **rule: Any) -> nn.Module:
    """Return such a model with an adapter that does something."""
    model = model_of(blocks)
    convpeft.inject(model, {"rules": [{"match": match, "kind": "lora", "rank": 2, **rule}]})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Whole:
    """Everything that a model is: classes, attributes, children, tensors, and what it gives."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self.look()

    def look(self) -> tuple[Any, ...]:
        modules = dict(self.model.named_modules())
        attributes = {name: {key: id(value) for key, value in vars(each).items()} for name, each in modules.items()}
        tensors = {name: (id(tensor), tensor.clone()) for name, tensor in self.model.state_dict(keep_vars=True).items()}
        with torch.no_grad():
            return {name: type(each) for name, each in modules.items()}, attributes, tensors, self.model(image())

    def check(self) -> None:
        classes, attributes, tensors, output = self.look()
        assert classes == self.seen[0]
        assert attributes == self.seen[1]
        assert list(tensors) == list(self.seen[2])
        for name, (identity, value) in tensors.items():
            assert identity == self.seen[2][name][0], name
            assert torch.equal(value, self.seen[2][name][1]), name
        assert torch.equal(output, self.seen[3])
