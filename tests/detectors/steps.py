"""The steps of the contract, each a function that raises where a library breaks it.

A step sees a library only through ``Library``, so the same steps judge others (``python -m benchmarks.detectors``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import convpeft

from ..cases import assert_relative, bits, same_bits
from .zoo import FAMILIES, Subject

RANK = 2
SPEC = {"rules": [{"match": "**", "kind": "lora", "rank": RANK}]}


class Library(Protocol):
    """What the steps ask of a library; ``model`` is what ``attach`` returned."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Return the model with an adapter on every convolution and linear layer, to be run like the bare one."""

    def adapted(self, model: nn.Module) -> set[str]:
        """Return the names, in the bare model, of the layers that have an adapter."""

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the adapters' parameters."""

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the adapters."""

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Return a bare model with the adapters of a file."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Return a plain model that computes the same."""

    def eject(self, model: nn.Module) -> nn.Module:
        """Return the bare model."""


class Convpeft:
    """convpeft through the steps' eyes: one short spec, LoRA on everything."""

    def __init__(self, spec: dict[str, Any] | None = None) -> None:
        self.spec = SPEC if spec is None else spec

    def attach(self, model: nn.Module) -> nn.Module:
        convpeft.inject(model, self.spec)
        return model

    def adapted(self, model: nn.Module) -> set[str]:
        names = {name for name, _ in model.named_modules(remove_duplicate=False)}
        return {name.removesuffix(".convpeft.default") for name in names if name.endswith(".convpeft.default")}

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for group in convpeft.param_groups(model, lr=1.0) for parameter in group["params"]]

    def save(self, model: nn.Module, path: Path) -> None:
        convpeft.save_adapter(model, path)

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        convpeft.load_adapter(model, path)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        return convpeft.merge(model)

    def eject(self, model: nn.Module) -> nn.Module:
        convpeft.eject(model)
        return model


@cache
def built(name: str) -> Subject:
    """Return a family's subject, built once; its model is for copies."""
    return FAMILIES[name].build()


@dataclass(frozen=True)
class Bench:
    """A subject, the library on trial, and a folder for its files."""

    name: str
    library: Library
    folder: Path = field(compare=False)

    @property
    def subject(self) -> Subject:
        """The family's subject."""
        return built(self.name)

    def bare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy of the model."""
        return copy.deepcopy(self.subject.model).to(dtype)

    def attached(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy with adapters, in eval mode."""
        return self.library.attach(self.bare(dtype)).eval()

    def scrambled(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy with adapters that change what the model computes, and do not blow it up."""
        model = self.attached(dtype)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.library.parameters(model):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
        return model

    def raw(self, model: nn.Module) -> list[Tensor]:
        """Return a model's outputs for one image, before thresholds and suppression."""
        with torch.no_grad():
            return tree_leaves(self.subject.raw(model, self.subject.images().to(next(model.parameters()).dtype)))

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return raw outputs and predictions for one image."""
        raw = self.raw(model)
        if self.subject.predict is self.subject.raw:
            return raw
        with torch.no_grad():
            return [*raw, *tree_leaves(self.subject.predict(model, self.subject.images()))]


def layers_of(model: nn.Module) -> set[str]:
    """Return the names of all convolutions and linear layers, each once."""
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Return all BatchNorms."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compare bit for bit."""
    assert len(actual) == len(expected) > 0, f"{len(actual)} outputs, {len(expected)} expected"
    for number, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert left.dtype == right.dtype, f"output {number} is {left.dtype}, expected {right.dtype}"
        assert torch.equal(left, right), f"output {number} differs"


def changed(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Make sure that adapters were felt: each output is finite and differs by far more than rounding."""
    for left, right in zip(actual, expected, strict=True):
        assert left.isfinite().all(), "an output is not finite"
        assert (left - right).abs().max() > 1e-6 * right.abs().max(), "the adapters change nothing"


def every_layer(bench: Bench) -> None:
    """One rule puts an adapter on every convolution and linear layer."""
    bare = bench.bare()
    wanted = layers_of(bare)
    without = wanted - bench.library.adapted(bench.library.attach(bare))
    assert not without, f"{len(without)} layers have no adapter"


def identity(bench: Bench) -> None:
    """A fresh adapter changes no bit of any output."""
    model = bench.attached()
    assert bench.library.parameters(model), "no adapters"
    same(bench.outputs(model), bench.outputs(bench.bare()))


@lru_cache(maxsize=1)  # three steps look at the same training step
def _trained(bench: Bench) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Return a model after one step with its own loss, and all its tensors before and after."""
    model = bench.attached().train()
    parameters = bench.library.parameters(model)
    before = bits(model)
    torch.manual_seed(0)
    loss = bench.subject.loss(model, bench.subject.images(2))
    assert torch.isfinite(loss), f"the loss is {loss}"
    loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    return model, before, bits(model)


def training_step(bench: Bench) -> None:
    """The model's own loss, in training mode, moves the adapter of every layer."""
    model, before, after = _trained(bench)
    for parameter in bench.library.parameters(model):
        assert parameter.grad is not None, "an adapter got no gradient"
        assert parameter.grad.isfinite().all(), "a gradient is not finite"
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    still = [name for name in bench.library.adapted(model) if not any(key.startswith(name + ".") for key in moved)]
    assert not still, f"adapters that did not move: {sorted(still)}"


def only_adapters_train(bench: Bench) -> None:
    """No parameter of the base wants or gets a gradient, and none changes."""
    model, before, after = _trained(bench)
    adapters = {id(parameter) for parameter in bench.library.parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            assert not parameter.requires_grad, f"{name} is trained"
            assert parameter.grad is None, f"{name} got a gradient"
            assert torch.equal(before[name], after[name]), f"{name} changed"


def norms_held(bench: Bench) -> None:
    """BatchNorm statistics stay, through ``train()`` and a training step."""
    model, before, after = _trained(bench)
    moved = [key for key, _ in model.named_buffers() if key in before and not torch.equal(before[key], after[key])]
    assert not moved, "running statistics changed"
    assert not any(norm.training for norm in norms_of(model)), "a BatchNorm is in training mode"


def save_and_load(bench: Bench) -> None:
    """Adapters written, and read into a newly built model, give the same bits."""
    model = bench.scrambled()
    path = bench.folder / "adapter.safetensors"
    bench.library.save(model, path)
    fresh = FAMILIES[bench.name].build().model
    changed(bench.raw(model), bench.raw(fresh))
    same(bench.outputs(bench.library.load(fresh, path).eval()), bench.outputs(model))


def merge(bench: Bench) -> None:
    """In float64 the merged model is plain, and computes what the adapted one does to 1e-12 of the largest output."""
    model, bare = bench.scrambled(torch.float64), bench.bare(torch.float64)
    expected = bench.raw(model)
    changed(expected, bench.raw(bare))
    merged = bench.library.merge(model).eval()
    for name, module in bare.named_modules():
        assert type(merged.get_submodule(name)) is type(module), (
            f"{name} is a {type(merged.get_submodule(name)).__name__}"
        )
    for actual, tensor in zip(bench.raw(merged), expected, strict=True):
        assert_relative(actual, tensor)


def eject(bench: Bench) -> None:
    """Taken out, the adapter leaves the same bits under the same keys in the same order."""
    before, expected = bits(bench.subject.model), bench.outputs(bench.bare())
    plain = bench.library.eject(bench.scrambled()).eval()
    assert list(bits(plain)) == list(before), "other keys, or another order"
    assert same_bits(bits(plain), before), "other values"
    same(bench.outputs(plain), expected)


STEPS: dict[str, Callable[[Bench], None]] = {
    "every layer": every_layer,
    "identity at start": identity,
    "training step": training_step,
    "only adapters train": only_adapters_train,
    "BatchNorm held": norms_held,
    "save and load": save_and_load,
    "merge": merge,
    "eject": eject,
}
