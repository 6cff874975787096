"""The plan of a merge tells what it does, and touches nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from tests.cases import CASES, Case, Variant, adapted, bits, named, same_bits
from tests.merging.layers import MERGEABLE, REP_MONA


@pytest.mark.parametrize(("case", "variant"), named(MERGEABLE))
def test_the_plan_tells_what_merge_does(case, variant):
    model = adapted(case, variant)
    rows = {form: convpeft.plan_merge(model, form=form).rows for form in ("auto", "single", "factored")}
    for form, (row,) in rows.items():
        assert row.name == "layer"
        assert row.form in (("absorbed", "single", "factored") if form == "auto" else ("absorbed", form)), row
        cost = row.macs_factored if row.form == "factored" else row.macs_single
        assert row.macs_after == cost
        chains = {name for name, _ in convpeft.merge(model, form=form).layer.named_children()}
        beside_or_after = row.form == "factored" or (
            row.form == "single" and row.kernel_before != row.kernel_after and "+" in row.kernel_after
        )
        assert bool(chains) == beside_or_after
    (auto,), (single,), (factored,) = rows["auto"], rows["single"], rows["factored"]
    assert auto.macs_after == min(single.macs_after, factored.macs_after)
    assert (single.macs_single, single.macs_factored) == (auto.macs_single, auto.macs_factored)


def test_a_7x7_beside_a_1x1_becomes_a_chain_and_not_a_49_times_dearer_kernel():
    case = Case("wide", lambda: nn.Conv2d(32, 32, 1), (1, 32, 9, 8))
    model = adapted(case, Variant("rep_mona", "parallel", {"rank": 4, "kernel_sizes": [3, 5, 7]}))
    plan = convpeft.plan_merge(model)
    (row,) = plan.rows
    assert (row.form, row.macs_before, row.macs_single) == ("factored", 32 * 32, 49 * 32 * 32)
    assert row.macs_after == 32 * 32 + 32 * 2 * 4 + 2 * 4 * 49 + 2 * 4 * 32
    assert "one kernel (32→32 7×7) would cost more" in str(plan)
    assert convpeft.merge(model).layer.kernel_size == (1, 1)
    assert convpeft.merge(model, form="single").layer.kernel_size == (7, 7)


def test_plan_merge_touches_nothing():
    model = adapted(CASES["3x3"], REP_MONA)
    objects = {id(thing) for thing in [*model.modules(), *model.parameters(), *model.buffers()]}
    before, classes, x = bits(model), [type(m) for m in model.modules()], CASES["3x3"].input()
    output = model(x)
    for form in ("auto", "single", "factored"):
        convpeft.plan_merge(model, form=form)
    assert same_bits(before, bits(model))
    assert [type(m) for m in model.modules()] == classes
    assert {id(thing) for thing in [*model.modules(), *model.parameters(), *model.buffers()]} == objects
    assert torch.equal(model(x), output)
