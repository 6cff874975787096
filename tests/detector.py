"""A detector in miniature, with everything a real one has that matters here, and what must not change about a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import convpeft
from tests.cases import bits, same_bits


class Block(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, channels: int, out: int, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1, bias=False, **options)
        self.norm = nn.BatchNorm2d(out)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Detector(nn.Module):
    """Stem, body, neck, two heads; ``(2, 3, 8, 8)`` images give ``(2, 4)`` scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 8)
        self.body = nn.ModuleList([Block(8, 8), Block(8, 8, groups=2)])
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.box = nn.Conv2d(8, 6, 1)
        self.score = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return self.score(self.box(self.neck(x)).mean((2, 3)))


LORA = {"match": "body.*.conv", "kind": "lora", "rank": 2}
A = {"rules": [LORA], "unfreeze": ["score", "body.0"]}
B = {"rules": [{"match": "stem.conv", "kind": "rep_mona", "rank": 2}], "unfreeze": ["box"], "norm": "adapt"}


def detector() -> Detector:
    """Return a float64 detector in eval mode whose norms have something to lose."""
    model = Detector().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def scrambled(model: nn.Module) -> Any:
    """Give every tensor of every adapter a random value, in place: its own and its values of the user's tensors."""
    active = convpeft.active_adapters(model)
    with torch.no_grad():
        for name in model._convpeft_state.adapters:
            convpeft.set_active(model, name)
            for group in convpeft.param_groups(model, lr=1.0):
                for parameter in group["params"]:
                    parameter.normal_(0, 0.5)
    convpeft.set_active(model, active)
    return model


def two() -> nn.Module:
    """Return a detector with ``a`` and ``b``, which unfroze different layers; ``b`` is active."""
    model = detector()
    convpeft.inject(model, A, name="a")
    convpeft.inject(model, {**B, "unfreeze": ["box"]}, name="b")
    return model


class Untouched:
    """Everything about a model that a refusal, a plan or an eject must leave as it was.

    Of a model that has adapters, the drawers of hidden tensors may come and go, and with them the order of their keys.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapted = "_convpeft_state" in model.__dict__
        self.bits = bits(model)
        self.seen = self._look()

    def _look(self) -> tuple[list, ...]:
        named = self.model.named_modules(remove_duplicate=False)
        modules = [(name, module) for name, module in named if "_stash" not in name]
        parameters = [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters(remove_duplicate=False)]
        buffers = [(name, id(b)) for name, b in self.model.named_buffers(remove_duplicate=False)]
        return (
            [(name, id(module), type(module), module.training, sorted(module.__dict__)) for name, module in modules],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module in modules],
            sorted(parameters) if self.adapted else parameters,
            sorted(buffers) if self.adapted else buffers,
        )

    def check(self) -> None:
        """Compare with what was there at first."""
        before, after = self.bits, bits(self.model)
        if self.adapted:
            before, after = dict(sorted(before.items())), dict(sorted(after.items()))
        assert same_bits(before, after)
        for before, after in zip(self.seen, self._look(), strict=True):
            assert before == after
