"""``rep_mona``: one kernel or one pass, whichever is cheaper, is the sum of its branches."""

from __future__ import annotations

import pytest

import convpeft
from convpeft.adapters import RepMona
from tests.cases import assert_relative, randomised
from tests.lean import gradients, images, net


@pytest.mark.parametrize(("rank", "form"), [(4, "one kernel"), (16, "one kernel"), (17, "one pass")])
def test_rep_mona_in_one_kernel_or_one_pass_is_the_sum_of_its_branches(rank, form):
    model = net()
    convpeft.inject(model, {"rules": [{"match": "**", "kind": "rep_mona", "rank": rank}]})
    randomised(model)
    first, found = model(images()), gradients(model, images())
    adapters = [module for module in model.modules() if isinstance(module, RepMona)]
    assert {adapter.form for adapter in adapters if adapter.site.geometry.groups == 1} == {form}
    assert {adapter.form for adapter in adapters if adapter.site.geometry.groups > 1} == {"one pass"}
    for apart in ("dense", "together"):
        for adapter in adapters:
            setattr(adapter, apart, None)
        assert_relative(model(images()), first)
        for name, gradient in gradients(model, images()).items():
            assert_relative(gradient, found[name])
