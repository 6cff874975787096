"""Lean gradients are those of ``lean=False``, whatever writes to a map between an activation and a layer."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor

from convpeft.convolution import nodes, origins
from tests.lean import SEES_HOOKS
from tests.properties.lean_cases import WRITES, Case, difference, drawn, expected

pytestmark = SEES_HOOKS
BLOCK = 100


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch warns of fallbacks for batches, of non-leaves and of hooks without effect
        yield


def assert_equal_gradients(block: int) -> None:
    found = [difference(drawn(seed)) for seed in range(BLOCK * block, BLOCK * (block + 1))]
    assert list(filter(None, found)) == []


@pytest.mark.parametrize("block", range(3))
def test_drawn_nets_have_the_gradients_of_lean_false(block):
    assert_equal_gradients(block)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("block", range(3, 40))
def test_more_drawn_nets_have_the_gradients_of_lean_false(block):
    assert_equal_gradients(block)


def by_versions(x: Tensor) -> origins.Origin | None:
    """Return an origin as the rule before this one did: by version counters, and by where the default hooks are from."""
    node = x.grad_fn
    activation = None if node is None or x._is_view() else origins._ACTIVATIONS.get(type(node).__name__)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) or ()
    known = ("torch.utils.checkpoint", "torch.autograd.graph")
    if activation is None or any(getattr(hook, "__module__", "") in known for hook in hooks):
        return None
    try:
        source = node._saved_self
    except RuntimeError:
        return None
    allowed = 1 if type(source.grad_fn).__name__ == "CloneBackward0" else 0
    return None if x._version > allowed or source.shape != x.shape else origins.Origin(source, activation(node))


def test_the_drawn_nets_tell_an_origin_that_is_not_proved(monkeypatch):
    """The rule of earlier versions fails, for many ways to write and for hooks that unpack once; so the nets can tell."""
    cases = [drawn(seed) for seed in range(2 * BLOCK)]
    monkeypatch.setattr(nodes, "origin_of", by_versions)
    wrong: Counter[str] = Counter(case.write for case in cases if difference(case) is not None)
    assert wrong.total() >= 20
    assert len(wrong) >= 8
    once = Case(
        0, "silu", "as it is", "none", "none", "itself", "once", "both", "nothing", "auto", "first", "nothing", 3, False,
        torch.float64,
    )  # fmt: skip
    clone = once._replace(hooks="none", before="clone", write="channels, under no_grad")
    assert "KeyError" in str(difference(once))
    assert "differs by" in str(difference(clone))


def test_the_drawn_nets_cover_what_they_claim():
    """Most cases have gradients to compare, every way to write is drawn, and inputs are recomputed in many of them."""
    cases = [drawn(seed) for seed in range(BLOCK)]
    assert {case.write for case in map(drawn, range(3 * BLOCK))} == set(WRITES)
    assert sum(isinstance(expected(case), dict) for case in cases) > 0.7 * BLOCK
    found = []
    real = nodes.origin_of

    def note(x: Tensor) -> origins.Origin | None:
        found.append(real(x))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "origin_of", note)
        for case in cases:
            difference(case)
    assert sum(origin is not None for origin in found) > 0.3 * BLOCK
