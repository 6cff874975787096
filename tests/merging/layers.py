"""The layers and kinds that merge, and what a merged model must not have."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.cases import LAYERS, SERVED, VARIANTS, Variant

FORMS = ("auto", "single", "factored")
CLAMPED = "tf-same-1x1-stride2"
REP_MONA = Variant("rep_mona", "parallel", {"rank": 2, "kernel_sizes": [3, 7]})
LORA = Variant("lora", "parallel", {"rank": 3})
LORA_OUT = Variant("lora", "output", {"rank": 3})
REP_MONA_OUT = Variant("rep_mona", "output", {"rank": 2, "kernel_sizes": [3]})
LINEAR_KINDS = [(case, variant) for case, variant in SERVED if variant.kind in ("lora", "rep_mona")]
MERGEABLE = [
    (case, variant)
    for case, variant in LINEAR_KINDS
    if not (case.name == CLAMPED and variant.kind == "rep_mona" and variant.place == "parallel")
]


def in_forms(pairs: list[tuple[Any, Variant]]) -> list[Any]:
    """Return ``pytest.param``s of each pair in each form; all but one form of a pair are nightly.

    The form goes round with the layer's number plus the variant's: each form meets every layer and every variant.
    """
    rows = []
    for case, variant in pairs:
        turn = (LAYERS.index(case) + VARIANTS.index(variant)) % len(FORMS)
        for number, form in enumerate(FORMS):
            marks = () if number == turn else pytest.mark.nightly
            rows.append(pytest.param(case, variant, form, id=f"{case.name}/{variant.name}-{form}", marks=marks))
    return rows


def assert_plain(model: nn.Module) -> None:
    """Nothing of convpeft is left: no key, no class, no attribute."""
    assert not [key for key in model.state_dict() if "convpeft" in key]
    assert not [name for name, _ in model.named_modules() if "convpeft" in name]
    assert not [
        type(m)
        for m in model.modules()
        if type(m).__name__.startswith("Adapted") or type(m).__module__.startswith("convpeft")
    ]
    assert not [key for module in model.modules() for key in vars(module) if "convpeft" in key]
