"""An inject that fails or is interrupted, wherever it is, leaves every bit as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters.registry import adapter_class
from convpeft.hosts.slots import Slots
from convpeft.injection import install, switching
from tests.detector import Untouched, detector, images, scrambled, two

EVERYTHING = {
    "rules": [{"match": "**", "kind": "lora", "only": "Conv2d"}, {"match": "body.*", "kind": "bottleneck"}],
    "unfreeze": ["score", "stem"],
    "norm": "adapt",
}


def adapted() -> nn.Module:
    """Return a detector with two adapters, of which the active one holds the norms."""
    model = scrambled(two())
    convpeft.set_active(model, "a")
    return model


CALLS = [
    (function, call)
    for function, calls in {
        "install.adapt": (1, 4, 10),
        "Slots.put": (1, 5),
        "Slots.put_owner": (1, 4),
        "switching.swap_in": (1, 5, 10),
        "switching.hold": (1, 3),
        "install.switch": (1,),
        "install.train_only": (1,),
    }.items()
    for call in calls
]


class TestFailingInjects:
    """A failure in the middle leaves a bare model bare, and an adapted one with just the adapters it had."""

    STARTS = pytest.mark.parametrize("start", [detector, adapted], ids=["bare", "adapted"])

    def assert_fails(self, model, error, text):
        before, x = Untouched(model), images()
        active, output = convpeft.active_adapters(model), model(x)
        with pytest.raises(error, match=text):
            convpeft.inject(model, EVERYTHING, name="new")
        before.check()
        assert convpeft.active_adapters(model) == active
        assert torch.equal(model(x), output)
        for name in active:
            convpeft.set_active(model, None)
            convpeft.set_active(model, name)
            assert torch.equal(model(x), output)

    @STARTS
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_constructor_that_raises_on_the_third_layer(self, start, error, monkeypatch):
        built, construct = [], adapter_class("lora").__init__

        def failing(self, site, options):
            construct(self, site, options)
            if self.down.device.type != "meta":
                built.append(self)
                if len(built) == 3:
                    raise error("the third")

        monkeypatch.setattr(adapter_class("lora"), "__init__", failing)
        self.assert_fails(start(), error, "the third")
        assert len(built) == 3

    @STARTS
    @pytest.mark.parametrize("done", [False, True], ids=["before it", "after it"])
    @pytest.mark.parametrize(("function", "call"), CALLS)
    def test_an_interrupt_while_installing(self, start, function, call, done, monkeypatch):
        place, name = function.split(".")
        owner = {"install": install, "Slots": Slots, "switching": switching}[place]
        original, calls = getattr(owner, name), []

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) != call:
                return original(*arguments)
            if done:
                original(*arguments)
            raise KeyboardInterrupt(function)

        model = start()
        monkeypatch.setattr(owner, name, interrupted)
        self.assert_fails(model, KeyboardInterrupt, function)
        assert len(calls) >= call
