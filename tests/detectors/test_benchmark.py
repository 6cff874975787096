"""The page of results: judged as the tests judge, and about the families and steps there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import detectors

from .steps import STEPS
from .zoo import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs" / "detectors.md").read_text(encoding="utf-8")
FAMILY = "timm-mobilenetv4"


def needs_timm() -> None:
    if FAMILIES[FAMILY].missing:
        pytest.skip("timm is not installed")


def test_a_pass_has_no_reason_and_a_failure_has_one_line() -> None:
    needs_timm()
    assert detectors.judge(FAMILY, "convpeft", STEPS["every layer"]) is None
    reason = detectors.judge(FAMILY, "peft", STEPS["every layer"])
    assert reason is not None
    assert re.match(r"ValueError: Targeting a Conv2d with groups=32", reason)
    assert "\n" not in reason


def test_peft_is_judged_on_the_layers_it_accepts_in_the_other_steps() -> None:
    needs_timm()
    for step in ("identity at start", "save and load", "merge", "eject"):
        assert detectors.judge(FAMILY, "peft", STEPS[step]) is None
    assert detectors.judge(FAMILY, "peft", STEPS["BatchNorm held"]) == "AssertionError: running statistics changed"


def test_a_table_has_a_row_for_each_family_and_says_below_what_failed() -> None:
    results: detectors.Results = {("x", name, step): None for name in ("one", "two") for step in STEPS}
    results["x", "two", "merge"] = results["x", "two", "eject"] = "ValueError: groups=7 is odd. It is. And more."
    lines = detectors.tables(results, "x").splitlines()
    assert lines[2] == "| one |" + " yes |" * len(STEPS)
    assert lines[3].count("**no**") == 2
    assert lines[-1] == "- *merge, eject* of two: `ValueError: groups=G is odd. It is`"


def test_the_page_is_about_every_family_and_step_and_convpeft_passes_all() -> None:
    ours = PAGE.split("## convpeft")[1].split("## peft")[0]
    header, _, *rows = [line.strip("| ").split(" | ") for line in ours.splitlines() if line.startswith("|")]
    assert header == ["family", *STEPS]
    assert rows == [[name, *["yes"] * len(STEPS)] for name in FAMILIES]
