"""Options mean what they say, and bad ones are named errors."""

from __future__ import annotations

import pytest
from torch import nn

import convpeft
from tests.cases import CASES, net

BAD_OPTIONS = [
    ("lora", {"rnak": 4}, r"unknown key 'rnak' for kind 'lora'\. Closest: rank"),
    ("lora", {"rank": 0}, "rank must be above 0, not 0"),
    ("lora", {"rank": 2.5}, r"rank of kind 'lora' must be a whole number, not 2\.5"),
    ("lora", {"rank": True}, "rank of kind 'lora' must be a whole number, not True"),
    ("lora", {"rank": None}, "rank of kind 'lora' must be a whole number, not None"),
    ("lora", {"alpha": "big"}, "alpha of kind 'lora' must be .*number or null, not 'big'"),
    ("lora", {"alpha": float("nan")}, "alpha of kind 'lora' must be a finite number"),
    ("lora", {"alpha": -1}, "alpha must be above 0, not -1"),
    ("lora", {"dropout": -0.1}, r"dropout must be at least 0 and below 1, not -0\.1"),
    ("lora", {"dropout": 1}, r"dropout must be at least 0 and below 1, not 1\.0"),
    ("lora", {"rslora": 1}, "rslora of kind 'lora' must be true or false, not 1"),
    ("rep_mona", {"rank": -3}, "rank must be above 0, not -3"),
    ("rep_mona", {"kernel_sizes": [3, 4]}, "kernel_sizes must be odd and at least 1 .*, not 4"),
    ("rep_mona", {"kernel_sizes": []}, "kernel_sizes must name at least one size"),
    ("rep_mona", {"kernel_sizes": 3}, "kernel_sizes of kind 'rep_mona' must be a list of a whole number, not 3"),
    ("rep_mona", {"scale": 0}, "scale must not start at 0"),
    ("rep_mona", {"dropout": 1.5}, r"dropout must be at least 0 and below 1, not 1\.5"),
    ("bottleneck", {"reduction": 0}, "reduction must be above 0, not 0"),
    ("bottleneck", {"rank": 0}, "rank must be above 0, not 0"),
    ("bottleneck", {"norm": "batch"}, "norm of kind 'bottleneck' must be one of 'none', 'group', not 'batch'"),
    ("bottleneck", {"gate": 0.0}, "gate must not start at 0"),
    ("bottleneck", {"gate": float("inf")}, "gate of kind 'bottleneck' must be a finite number"),
    ("lora", {"rank": 0, "dropout": -1}, r"2 problems.*\n.*rank must be above 0.*\n.*dropout"),
]


@pytest.mark.parametrize(("kind", "options", "text"), BAD_OPTIONS, ids=[f"{k}-{o}" for k, o, _ in BAD_OPTIONS])
def test_bad_options_are_named(kind, options, text):
    model = net(CASES["3x3"])
    rule = {"match": "layer", "kind": kind, **options}
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.inject(model, {"rules": [rule]})
    with pytest.raises(convpeft.OptionError, match=text):
        convpeft.plan(model, convpeft.Spec(rules=[convpeft.Rule("layer", kind, **options)]))
    assert type(model.layer) is nn.Conv2d
