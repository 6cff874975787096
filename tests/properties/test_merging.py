"""Random layers, adapters, merge forms and dtypes: merged equals adapted, or a refusal says why. No crash, never wrong.

A case is one geometry (with its class and bias), one choice of kinds, and one form of merge. The profile ``ci`` sees at
least 2,000 different ones, ``make nightly`` at least 20,000; conftest.py has both profiles.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convpeft
from convpeft.hosts.chains import AFTER, BESIDE
from convpeft.hosts.slots import base_class
from tests.cases import DTYPES, randomised
from tests.properties.drawn import Drawn, layers, rules
from tests.references import padded

FORMS = ("auto", "single", "factored")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2 * 2**-7, torch.float16: 2 * 2**-10}
# for each family its share of a profile's examples, and how many different cases it must see for each hundred of its own
FAMILIES = {
    "pixels": (0.40, 210),
    "same": (0.10, 190),
    "tf-same": (0.14, 190),
    "transposed": (0.10, 150),
    "subclass": (0.22, 170),
    "linear": (0.04, 120),
}
MORE_THAN_THEIR_WEIGHT = ("NormedConv", "ScaledConv", "StdConv2d", "StdConv2dSame")
COMPUTED = "ParametrizedConv2d"


class Tally:
    """What one family's run has seen.

    Attributes:
        cases: that were different.
        worst: for each dtype and form, the largest error in parts of the budget.
    """

    def __init__(self) -> None:
        self.cases: set[tuple[str, str, str]] = set()
        self.worst: Counter[tuple[str, str]] = Counter()

    def __str__(self) -> str:
        worst = ", ".join(f"{dtype} {form} {share:.2g}" for (dtype, form), share in sorted(self.worst.items()))
        return f"{len(self.cases):,} different cases; largest errors, in parts of the budget: {worst}"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_adapted_or_refused(family, record_property):
    """Run a family's share of the profile's examples, in all three forms each, and count the different cases."""
    share, per_hundred = FAMILIES[family]
    examples = round(share * settings().max_examples)
    tally = Tally()

    @settings(max_examples=examples)
    @given(
        drawn=layers(family),
        chosen=st.lists(rules(family), min_size=1, max_size=2),
        dtype=st.sampled_from([torch.float64, *DTYPES]),
        start=st.integers(0, 9),
    )
    @torch.no_grad()
    def holds(drawn, chosen, dtype, start):
        torch.manual_seed(start)
        # oneDNN's own bfloat16 convolutions of few channels are wrong on some processors (torch 2.14, AVX512-BF16)
        with torch.backends.mkldnn.flags(enabled=dtype not in (torch.bfloat16, torch.float16)):
            check(drawn, chosen, dtype, tally)

    holds()
    record_property("cases", len(tally.cases))
    print(f"{family}: {tally}", file=sys.stderr)
    assert len(tally.cases) >= examples * per_hundred // 100


@pytest.mark.parametrize(("profile", "cases"), [("ci", 2_000), ("nightly", 20_000)])
def test_the_families_see_enough_cases(profile, cases):
    examples = settings.get_profile(profile).max_examples
    assert sum(round(share * examples) * per_hundred // 100 for share, per_hundred in FAMILIES.values()) >= cases


def check(drawn: Drawn, chosen: list[dict], dtype: torch.dtype, tally: Tally) -> None:
    """Inject, adapt and merge one layer."""
    model = nn.ModuleDict({"layer": copy.deepcopy(drawn.layer)}).to(dtype).eval()
    for parameter in model.parameters():  # drawn before the seed was set: the same case must have the same numbers
        parameter.uniform_(-1, 1)
    x = drawn.inputs(dtype)
    bare = model["layer"](x)
    served = [rule for rule in chosen if is_served(rule, drawn, model)]
    if not served:
        return
    for number, rule in enumerate(served):
        convpeft.inject(model, {"rules": [rule]}, name=f"a{number}")
        assert_same(model["layer"](x), bare)
    convpeft.set_active(model, [f"a{number}" for number in range(len(served))])
    assert_same(convpeft.merge(model, strict=False)["layer"](x), bare)
    randomised(model)
    exact = copy.deepcopy(model).double()
    adapted = exact["layer"](x.double())
    compare_with_formulas(exact["layer"], x.double(), adapted)
    for form in FORMS:
        tally.cases.add((drawn.geometry, repr(served), form))
        check_form(model, served, form, (x, adapted), drawn, tally)


def check_form(
    model: nn.ModuleDict, served: list[dict], form: str, run: tuple[Tensor, Tensor], drawn: Drawn, tally: Tally
) -> None:
    """Merge in one form and compare, or see that the refusal is a known one."""
    reasons: dict[str, str] = {}
    try:
        merged = convpeft.merge(model, form=form)["layer"]
    except convpeft.MergeError as refusal:  # the plan says the same: tests/merging/test_plan.py
        reasons = refusal.reasons
    if reasons:
        event("refused")
        assert reasons.keys() == {"layer"}
        assert_known_refusal(reasons["layer"], drawn, served)
        return
    assert type(merged) is base_class(model["layer"])
    assert not [key for key in merged.state_dict() if "convpeft" in key]
    x, adapted = run
    if is_too_small(merged, x):  # torch repeats or reflects a map once at most
        event("a map smaller than the grown padding")
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):
            merged(x)
        return
    got = merged(x)
    share = excess(merged, x, got, adapted)
    key = (str(x.dtype).removeprefix("torch."), form)
    tally.worst[key] = max(tally.worst[key], share)
    assert share <= 1, f"{share:.2f} times the budget of {x.dtype}, {form}"


def is_too_small(merged: nn.Module, x: Tensor) -> bool:
    """Whether a grown kernel's padding no longer fits the map in a mode where torch limits it."""
    steps = [module for module in merged.modules() if isinstance(module, nn.Conv2d)]
    limits = {"circular": 0, "reflect": 1}
    return any(
        max(step._reversed_padding_repeated_twice[2 * axis : 2 * axis + 2]) + limits[step.padding_mode]
        > x.shape[-1 - axis]
        for step in steps
        if step.padding_mode in limits
        for axis in (0, 1)
    )


def excess(merged: nn.Module, x: Tensor, got: Tensor, adapted: Tensor) -> float:
    """Return the largest error of a merged layer in parts of what ``x.dtype`` allows.

    The error is against the exact output of the adapted layer, whose weights are rounded to the dtype already; the
    budget is 1e-12, 1e-5, or 2 ulp of the output scale, which is the largest output, an ulp of it being eps times it. See
    "Error budget" in docs/merging.md for the derivation. A chain's sum is rounded after its terms were, and these can be
    larger than it: there the scale is that of the largest term. What a layer with more in it than a convolution rounds
    beside its chain, it rounds without one; and torch's transposed convolution rounds each of its additions in float16.
    """
    assert got.shape == adapted.shape
    if not got.numel():
        return 0.0
    error = float((got.double() - adapted).abs().max())
    rounds_often = isinstance(merged, nn.ConvTranspose2d) and x.dtype == torch.float16
    if rounds_often or type(merged).__name__ in MORE_THAN_THEIR_WEIGHT:
        error -= rounding_of(merged, x)
    return error / (LIMITS[x.dtype] * max(float(adapted.abs().max()), largest_term(merged, x), 1e-300))


def rounding_of(layer: nn.Module, x: Tensor) -> float:
    """Return the largest error of what a layer itself makes of ``x``, without its chains."""
    exact, forward = copy.deepcopy(layer).double(), type(layer).forward
    return float((forward(layer, x).double() - forward(exact, x.double())).abs().max())


def largest_term(merged: nn.Module, x: Tensor) -> float:
    """Return the largest value among what a factored layer adds up: its own output and its chains'; 0 without chains."""
    exact = copy.deepcopy(merged).double()
    chains = [chain for name in (BESIDE, AFTER) for chain in exact._modules.get(name) or ()]
    if not chains:
        return 0.0
    own = type(exact).forward(exact, x.double())
    read = own if AFTER in exact._modules else x.double()
    return max(float(term.abs().max()) for term in [own, *(chain(read) for chain in chains)])


def is_served(rule: dict, drawn: Drawn, model: nn.Module) -> bool:
    """Whether the kind takes the layer; if not, it says so at plan time in the words that are due."""
    kind, name, refusal = rule["kind"], type(drawn.layer).__name__, None
    if drawn.family == "transposed" and kind != "lora" and rule["place"] == "parallel":
        refusal = r"cannot serve \(ConvTranspose2d\)"
    elif drawn.family == "linear" and kind in ("rep_mona", "moe_rep_mona", "conv_lora"):
        refusal = "channels are the last axis"
    elif (rule.get("dora") or kind == "peft:loha") and name in (*MORE_THAN_THEIR_WEIGHT, COMPUTED):
        refusal = "which is no plain parameter here" if name == COMPUTED else "not the convolution of its weight alone"
    if refusal is None:
        return True
    event("not served")
    with pytest.raises(convpeft.SpecError, match=refusal):
        convpeft.inject(model, {"rules": [rule]})
    return False


def compare_with_formulas(layer: nn.Module, x: Tensor, adapted: Tensor) -> None:
    """See that an adapted layer in float64 is the bare one and each adapter's formula, written down once more."""
    adapters = [layer.convpeft[name] for name in layer.convpeft.active]
    if not all(adapter.kind in ("lora", "rep_mona") for adapter in adapters):
        return
    own = base_class(layer).forward(layer, x)
    expected = own + sum(padded.update(layer, a, own if a.site.place == "output" else x) for a in adapters)
    assert adapted.shape == expected.shape
    if expected.numel():
        assert float((adapted - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def assert_same(output: Tensor, bare: Tensor) -> None:
    """See that two outputs have the same dtype and bits."""
    assert output.dtype == bare.dtype
    assert torch.equal(output, bare)


def assert_known_refusal(reason: str, drawn: Drawn, served: list[dict]) -> None:
    """Whatever is refused is one of these, for one of these reasons."""
    if "clamped" in reason:
        assert drawn.family in ("tf-same", "subclass")
    elif "do not fold into one kernel" in reason or "depends on the layer" in reason:
        assert {rule["place"] for rule in served} == {"parallel", "output"}
    elif "no convolution equals it" in reason:
        assert {"moe_rep_mona", "conv_lora"} & {rule["kind"] for rule in served}
    elif "plain parameter" in reason:
        assert type(drawn.layer).__name__ == COMPUTED
    else:
        assert "does not compute what the adapted one does" in reason
        assert type(drawn.layer).__name__ in MORE_THAN_THEIR_WEIGHT


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_merged_layers_refuse_inputs_smaller_than_their_grown_padding_in_words(mode):
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)})
    convpeft.inject(model, {"rules": [{"match": "layer", "kind": "rep_mona", "kernel_sizes": [7]}]})
    randomised(model)
    small = torch.randn(1, 4, 2, 2)
    assert model["layer"](small).shape == (1, 6, 2, 2)
    for form in ("single", "factored"):
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):
            convpeft.merge(model, form=form)["layer"](small)
