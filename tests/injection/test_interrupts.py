"""After an interrupt at any line of any verb, the model is what it was before or what it is after; never something else."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

import convpeft
from tests.detector import scrambled
from tests.interrupts import differences, interrupted, lines_of, look

X = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LORA = {"match": "0", "kind": "lora", "rank": 2}
A = {"rules": [LORA], "unfreeze": ["3"]}
B = {"rules": [{"match": "2", "kind": "bottleneck", "reduction": 2}], "unfreeze": ["0"], "norm": "adapt"}
C = {"rules": [{"match": "2", "kind": "lora", "rank": 1}], "unfreeze": ["1", "3"]}


def base() -> nn.Module:
    """Return a convolution, a norm, and two convolutions, in training; one tensor is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)).double()
    model[2].bias.requires_grad_(False)
    nn.init.normal_(model[1].running_mean)
    return model.train()


def adapted() -> nn.Module:
    """Return it with two adapters; the active one adapts the norm, and they unfroze different layers."""
    model = base()
    convpeft.inject(model, A, name="a")
    convpeft.inject(model, B, name="b")
    return scrambled(model)


def plain() -> nn.Module:
    """Return it with two active adapters that merge."""
    model = base().eval()
    convpeft.inject(model, A, name="a")
    convpeft.inject(model, {"rules": [{"match": "2", "kind": "rep_mona", "rank": 2}]}, name="b")
    convpeft.set_active(model, ["a", "b"])
    return scrambled(model)


def in_block(enter: Callable, model: nn.Module) -> None:
    with enter(model):
        pass


def nested(model: nn.Module) -> None:
    with convpeft.using(model, "a"), convpeft.disabled(model):
        convpeft.set_active(model, "a")


def evaluated() -> nn.Module:
    return adapted().eval()


def run_routed(model: nn.Module) -> None:
    with convpeft.route(model, ["a", "b"]), torch.no_grad():
        model(X)


def run_twice(model: nn.Module) -> None:
    with convpeft.using(model, "a"), torch.no_grad():
        model(X)
        with convpeft.route(model, [None, "b"]):
            model(X)


@cache
def adapter_file() -> Path:
    model = base()
    convpeft.inject(model, C, name="c")
    return convpeft.save_adapter(scrambled(model), Path(tempfile.mkdtemp()) / "c.safetensors")


VERBS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "set_active": (adapted, lambda model: convpeft.set_active(model, "a")),
    "set_active none": (adapted, lambda model: convpeft.set_active(model, None)),
    "using": (adapted, partial(in_block, lambda model: convpeft.using(model, "a"))),
    "disabled": (adapted, partial(in_block, convpeft.disabled)),
    "using nested": (adapted, nested),
    "eject one": (adapted, lambda model: convpeft.eject(model, "a")),
    "eject the active": (adapted, lambda model: convpeft.eject(model, "b")),
    "eject all": (adapted, convpeft.eject),
    "route": (adapted, partial(in_block, lambda model: convpeft.route(model, ["a", None]))),
    "inject first": (base, lambda model: convpeft.inject(model, C, name="c")),
    "inject": (adapted, lambda model: convpeft.inject(model, C, name="c", lean=False)),
    "a routed pass": (evaluated, run_routed),
    "two passes": (evaluated, run_twice),
    "load": (adapted, lambda model: convpeft.load_adapter(model, adapter_file())),
    "save": (adapted, lambda model: convpeft.save_adapter(model, adapter_file().with_name("saved.st"), name="a")),
    "merge": (plain, convpeft.merge),
    "merge in place": (plain, lambda model: convpeft.merge(model, inplace=True)),
    "merge in place, factored": (plain, lambda model: convpeft.merge(model, inplace=True, form="factored")),
}


def points(call: Callable[[], object], count: int, seed: str) -> list[int]:
    """Return lines to stop at: half of them anywhere, half in the last part, where a model is changed."""
    lines = lines_of(call)
    drawn = random.Random(seed)
    late = max(1, lines - 800)
    return [drawn.randint(1 if number % 2 else late, lines) for number in range(count)]


def one_of_the_two(model: nn.Module, before: dict, after: dict, where: str) -> str:
    found = look(model, X)
    apart = [differences(state, found) for state in (before, after)]
    assert not apart[0] or not apart[1], f"neither, after an interrupt at {where}: {apart}"
    return "before" if not apart[0] else "after"


def every_state(model: nn.Module) -> dict:
    """Return what the model gives with each adapter, bare, and ejected: the next verbs, and that no bit is lost."""
    found = {}
    if "_convpeft_state" in model.__dict__:
        for name in (*model._convpeft_state.adapters, None):
            convpeft.set_active(model, name)
            found[name] = look(model, X)
        convpeft.eject(model)
    found["ejected"] = look(model, X)
    return found


def assert_whole(verb: str, count: int, start: Callable, call: Callable) -> set[str]:
    model = start()
    before, finished = look(model, X), copy.deepcopy(model)
    torch.manual_seed(1)
    call(finished)
    after = look(finished, X)
    expected = {"before": every_state(copy.deepcopy(model)), "after": every_state(finished)}
    seen = set()
    torch.manual_seed(1)
    for number, line in enumerate(points(lambda: call(copy.deepcopy(model)), count, verb)):
        tried = copy.deepcopy(model)
        torch.manual_seed(1)
        where = interrupted(partial(call, tried), line)
        state = one_of_the_two(tried, before, after, where)
        seen.add(state)
        if number % 4:
            continue
        then = every_state(tried)
        assert then.keys() == expected[state].keys()
        for name, value in then.items():
            assert not (apart := differences(expected[state][name], value)), f"{where}: {name}: {apart}"
    return seen


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_leaves_one_of_the_two(verb):
    assert "before" in assert_whole(verb, 24, *VERBS[verb])


@pytest.mark.nightly
@pytest.mark.parametrize("verb", VERBS)
def test_many_interrupts_leave_one_of_the_two(verb):
    assert "before" in assert_whole(verb, 400, *VERBS[verb])


@pytest.mark.parametrize("count", [30, pytest.param(400, marks=pytest.mark.nightly)])
def test_an_interrupted_pass_leaves_the_model_routed(count):
    """Inside the block every sample still goes through its own adapters, and after it the model is as before."""
    model = evaluated()
    before = look(model, X)

    def run(tried: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return tried(X)

    with convpeft.route(model, ["a", "b"]):
        expected, trains = run(model), [p.requires_grad for p in model.parameters()]
        for line in points(partial(run, model), count, "pass"):
            where = interrupted(partial(run, model), line)
            assert torch.equal(run(model), expected), where
            assert [p.requires_grad for p in model.parameters()] == trains, where
    assert not differences(before, look(model, X))


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("names", ["a", None, ["a", "b"]], ids=str)
def test_an_interrupted_enter_is_outside_and_an_interrupted_leave_too(names, count):
    model = adapted()
    before = look(model, X)
    block = convpeft.route if isinstance(names, list) else convpeft.using
    for line in points(lambda: block(copy.deepcopy(model), names).__enter__(), count, "enter"):
        context = block(model, names)
        where = interrupted(context.__enter__, line)
        if where:
            assert not differences(before, look(model, X)), where
        else:
            context.__exit__(None, None, None)
    left = block(model, names)
    left.__enter__()
    for line in points(partial(left.__exit__, None, None, None), count, "leave"):
        context = block(model, names)
        context.__enter__()
        where = interrupted(partial(context.__exit__, None, None, None), line)
        assert not differences(before, look(model, X)), where
