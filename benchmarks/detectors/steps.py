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

import convpeft
from convpeft.planning.globs import matches

from .comparisons import assert_relative, bits, changed, same, same_bits, tensors
from .zoo import FAMILIES, Subject

RANK = 2
LORA = {"kind": "lora", "rank": RANK}
SLOT = ".convpeft.default"  # what convpeft adds to a layer's name for its adapter


class Library(Protocol):
    """What the steps ask of a library; ``model`` is what ``attach`` returned."""

    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        """Return the model with an adapter on every adaptable layer, to be run like the bare one; it may be changed."""

    def adapters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the adapters' parameters, by the names in the bare model of the layers that have one."""

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the adapters."""

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Return a bare model with the adapters of a file."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Return a plain model that computes the same."""

    def eject(self, model: nn.Module) -> nn.Module:
        """Return the bare model."""


class Convpeft:
    """convpeft through the steps' eyes: one rule, LoRA on everything unless told otherwise."""

    def __init__(self, rule: dict[str, Any] | None = None) -> None:
        self.rule = LORA if rule is None else rule

    def spec(self, subject: Subject) -> dict[str, Any]:
        """Return the whole spec: one rule."""
        return {"rules": [{"match": subject.match, **self.rule}]}

    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        """Return the model with convpeft's adapters in it."""
        convpeft.inject(model, self.spec(subject))
        return model

    def adapters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of every adapter, by layer."""
        slots = [(name, module) for name, module in model.named_modules() if name.endswith(SLOT)]
        return {name.removesuffix(SLOT): list(module.parameters()) for name, module in slots}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the adapter's one file."""
        convpeft.save_adapter(model, path)

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the model with the adapter of that file."""
        convpeft.load_adapter(model, path)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """Return a merged copy."""
        return convpeft.merge(model)

    def eject(self, model: nn.Module) -> nn.Module:
        """Return the model with the adapters taken out."""
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
        return self.library.attach(self.bare(dtype), self.subject).eval()

    def scrambled(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy with adapters that change what the model computes."""
        return self.scramble(self.attached(dtype))

    def scramble(self, model: nn.Module) -> nn.Module:
        """Move the adapters as training might, enough to be felt and not so far that outputs blow up, in place.

        Those of layers that take no part in the loss stay as they are, since no training moves them.
        """
        generator = torch.Generator().manual_seed(3)
        unlearned = self.named(self.subject.unlearned)
        with torch.no_grad():
            for name, own in self.library.adapters(model).items():
                for parameter in own if name not in unlearned else ():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return model

    def named(self, patterns: tuple[str, ...]) -> set[str]:
        """Return the layers that the patterns mean; each pattern must mean one at least."""
        layers = layers_of(self.subject.model)
        found = {pattern: {name for name in layers if matches(pattern, name)} for pattern in patterns}
        assert all(found.values()), found
        return set().union(*found.values())

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of all adapters."""
        return [parameter for each in self.library.adapters(model).values() for parameter in each]

    def raw(self, model: nn.Module) -> list[Tensor]:
        """Return a model's outputs for one image, before thresholds and suppression."""
        with torch.no_grad():
            return tensors(self.subject.raw(model, self.subject.images().to(next(model.parameters()).dtype)))

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return raw outputs and predictions for one image."""
        with torch.no_grad():
            return self.raw(model) + tensors(self.subject.predict(model, self.subject.images()))


def layers_of(model: nn.Module) -> set[str]:
    """Return the names of all convolutions and linear layers, each once."""
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Return all BatchNorms."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def every_layer(bench: Bench) -> None:
    """One rule puts an adapter on every adaptable convolution and linear layer, and the model runs."""
    model = bench.attached()
    wanted = layers_of(bench.subject.model) - bench.named(bench.subject.bare)
    without = wanted - set(bench.library.adapters(model))
    assert not without, f"{len(without)} layers have no adapter"
    bench.raw(model)


def identity(bench: Bench) -> None:
    """A fresh adapter changes no bit of any output."""
    model = bench.attached()
    assert bench.library.adapters(model), "no adapters"
    same(bench.outputs(model), bench.outputs(bench.bare()))


@dataclass(frozen=True)
class Trained:
    """A model after one step with its own loss, and all tensors of it and of its adapters before that step."""

    model: nn.Module
    before: dict[str, Tensor]
    adapters_before: dict[str, list[Tensor]]


@lru_cache(maxsize=1)  # three steps look at the same training step
def trained(bench: Bench) -> Trained:
    """Return a model that took one step with its own loss."""
    model = bench.attached().train()
    adapters = {name: [each.detach().clone() for each in own] for name, own in bench.library.adapters(model).items()}
    result = Trained(model, bits(model), adapters)
    torch.manual_seed(0)
    loss = bench.subject.loss(model, bench.subject.images(2))
    assert torch.isfinite(loss), f"the loss is {loss}"
    loss.backward()
    torch.optim.SGD(bench.parameters(model), lr=0.1).step()
    return result


def training_step(bench: Bench) -> None:
    """The model's own loss, in training mode, moves the adapter of every layer that takes part in it."""
    done, subject = trained(bench), bench.subject
    adapters = bench.library.adapters(done.model)
    unlearned = bench.named(subject.unlearned)
    for name in adapters.keys() - unlearned:
        for parameter in adapters[name]:
            assert parameter.grad is not None, "an adapter got no gradient"
            assert parameter.grad.isfinite().all(), "a gradient is not finite"
    still = {name for name, own in adapters.items() if all(map(torch.equal, own, done.adapters_before[name]))}
    expected = (unlearned | bench.named(subject.still)) & adapters.keys()
    assert still <= expected, f"adapters that did not move: {sorted(still - expected)}"
    assert still == expected, f"adapters that moved against what the zoo says: {sorted(expected - still)}"


def only_adapters_train(bench: Bench) -> None:
    """No parameter of the base wants or gets a gradient, and none changes."""
    done = trained(bench)
    adapters = {id(parameter) for parameter in bench.parameters(done.model)}
    after = bits(done.model)
    for name, parameter in done.model.named_parameters():
        if id(parameter) not in adapters:
            assert not parameter.requires_grad, f"{name} is trained"
            assert parameter.grad is None, f"{name} got a gradient"
            assert torch.equal(done.before[name], after[name]), f"{name} changed"


def norms_held(bench: Bench) -> None:
    """BatchNorm statistics stay, through ``train()`` and a training step."""
    done = trained(bench)
    buffers = [(key, buffer) for key, buffer in done.model.named_buffers() if key in done.before]
    assert all(torch.equal(done.before[key], buffer) for key, buffer in buffers), "running statistics changed"
    assert not any(norm.training for norm in norms_of(done.model)), "a BatchNorm is in training mode"


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
    merges(bench, bench.scrambled(torch.float64), bench.bare(torch.float64))


def merges(bench: Bench, model: nn.Module, bare: nn.Module) -> None:
    """Raise unless the merged model has the bare one's modules and computes what the adapted one does."""
    expected = bench.raw(model)
    changed(expected, bench.raw(bare))
    merged = bench.library.merge(model).eval()
    for name, module in bare.named_modules():
        found = type(merged.get_submodule(name))
        assert found is type(module), f"{name} is a {found.__name__}"
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
