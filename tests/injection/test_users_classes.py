"""Verbs on modules of the user's whose own methods raise, and inside ``torch.inference_mode``: done whole, or not at all."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import convpeft
from tests.detector import scrambled
from tests.injection.test_interrupts import VERBS, A, B, X, adapted, base
from tests.interrupts import Lines, differences, look

METHODS = (
    "parameters",
    "named_parameters",
    "requires_grad_",
    "train",
    "named_modules",
    "children",
    "modules",
    "zero_grad",
)


class Strike:
    """A subclass of Conv2d whose ``method`` raises after so many calls; ``calls`` may be set at any time."""

    def __init__(self, method: str) -> None:
        own, self.calls = getattr(nn.Module, method), 10**9

        def failing(module: nn.Module, *args: object, **kwargs: object) -> object:
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError(f"no {method} today")
            return own(module, *args, **kwargs)

        self.made = type("Own", (nn.Conv2d,), {method: failing})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("verb", ["inject", "set_active", "eject"])
def test_a_method_that_raises_leaves_the_model_before_or_after(verb, method, calls):
    strike = Strike(method)

    def start() -> nn.Module:
        model = base()
        model[2].__class__ = strike.made
        if verb != "inject":
            convpeft.inject(model, A, name="a")
            convpeft.inject(model, B, name="b")
            scrambled(model)
        torch.manual_seed(1)
        return model

    work: Callable[[nn.Module], object] = {
        "inject": lambda model: convpeft.inject(model, A, name="a"),
        "set_active": lambda model: convpeft.set_active(model, "a"),
        "eject": convpeft.eject,
    }[verb]
    done = start()
    work(done)
    after, model = look(done, X), start()
    before, strike.calls = look(model, X), calls
    with contextlib.suppress(RuntimeError):
        work(model)
    strike.calls = 10**9
    found = look(model, X)
    apart = [differences(state, found) for state in (before, after)]
    assert not all(apart), apart


@pytest.mark.parametrize("verb", ["set_active", "eject one", "eject all", "inject", "merge in place", "load"])
def test_an_interrupt_while_another_is_being_undone(verb):
    """Two interrupts a few lines apart: what the second leaves half done, the next call of convpeft finishes."""
    start, call = VERBS[verb]
    model = start()
    before, done = look(model, X), copy.deepcopy(model)
    torch.manual_seed(1)
    with Lines() as lines:
        call(done)
    after = look(done, X)
    for line in range(max(1, lines.count - 400), lines.count, 29):
        for later in (1, 4, 17):
            tried = copy.deepcopy(model)
            torch.manual_seed(1)
            try:
                _twice(partial(call, tried), line, later)
            except KeyboardInterrupt:
                torch.set_grad_enabled(True)
            with contextlib.suppress(convpeft.StateError):
                convpeft.active_adapters(tried)
            found = look(tried, X)
            apart = [differences(state, found) for state in (before, after)]
            assert not all(apart), f"{line} + {later}: {apart}"


def _twice(call: Callable[[], object], line: int, later: int) -> None:
    """Make a call with an interrupt at one of its lines, and another so many lines after that."""

    class Twice(Lines):
        def _line(self, frame, event, argument):
            if event == "line":
                self.count += 1
                if self.count in (line, line + later):
                    self.raised = "here"
                    raise KeyboardInterrupt(self.raised)
            return self._line

    with Twice():
        call()


class TestInferenceMode:
    def test_what_is_injected_inside_trains_outside(self):
        model = base()
        with torch.inference_mode():
            convpeft.inject(model, B, name="b")
        assert not any(parameter.is_inference() for parameter in model.parameters())
        model(X).square().mean().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained
        assert all(parameter.grad is not None for parameter in trained)

    def test_switching_inside_is_switching(self):
        model, other = adapted().eval(), adapted().eval()
        for names in ("a", None, "b"):
            with torch.inference_mode():
                convpeft.set_active(model, names)
            convpeft.set_active(other, names)
            assert not differences(look(model, X), look(other, X))

    def test_what_is_loaded_inside_is_what_was_saved_and_trains(self, tmp_path):
        model = adapted()
        path = convpeft.save_adapter(model, tmp_path / "b.safetensors", name="b")
        fresh = base()
        with torch.inference_mode():
            convpeft.load_adapter(fresh, path)
        assert torch.equal(fresh.eval()(X), model.eval()(X))
        fresh.train()(X).square().mean().backward()
        assert all(parameter.grad is not None for parameter in fresh.parameters() if parameter.requires_grad)

    def test_a_copy_merged_inside_trains_and_saves_as_one_merged_outside(self):
        model = base().eval()
        convpeft.inject(model, A, name="a")
        scrambled(model)
        with torch.inference_mode():
            merged = convpeft.merge(model)
        assert torch.equal(merged(X), convpeft.merge(model)(X))
        for parameter in merged.parameters():
            parameter.requires_grad_()
        merged(X).sum().backward()

    def test_ejecting_inside_gives_the_base_back(self):
        model, bare = adapted(), base()
        with torch.inference_mode():
            convpeft.eject(model)
        assert not differences(look(model, X), look(bare, X))
        assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))

    def test_a_model_made_inside_is_adapted_and_given_back(self):
        with torch.inference_mode():
            model = base().eval()
        convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 1}]})
        with torch.no_grad():
            expected = model(X)
        assert torch.equal(expected, base().eval()(X))
        convpeft.eject(model)
        assert all(tensor.is_inference() for tensor in model.parameters())
