"""The page of results: judged as the tests judge, and about the families and steps there are."""

from __future__ import annotations

import re

import pytest
from torch import nn

from benchmarks.detectors import judging, page, peers
from benchmarks.detectors.steps import STEPS, built
from benchmarks.detectors.zoo import FAMILIES, Subject

from .conftest import BenchOf

PAGE = page.PAGE.read_text(encoding="utf-8")
FAMILY = "timm-mobilenetv4"
TF_FAMILY = "timm-efficientnet-tf"


def test_a_pass_has_no_reason_and_a_failure_has_one_line() -> None:
    assert judging.judge(FAMILY, "convpeft", STEPS["every layer"]) is None
    reason = judging.judge(FAMILY, "peft", STEPS["every layer"])
    assert reason is not None
    assert re.match(r"ValueError: Targeting a Conv2d with groups=32", reason)
    assert "\n" not in reason


@pytest.mark.parametrize(("library", "family"), [("peft", FAMILY), ("LyCORIS", FAMILY), ("LyCORIS", TF_FAMILY)])
def test_others_are_judged_on_the_layers_they_can_adapt_in_the_other_steps(library: str, family: str) -> None:
    results = {step: judging.judge(family, library, STEPS[step]) for step in list(STEPS)[1:]}
    assert results.pop("BatchNorm held") == "AssertionError: running statistics changed"
    assert set(results.values()) == {None}


def test_lycoris_crashes_on_a_convolution_that_pads_by_itself_and_takes_every_other_layer() -> None:
    assert judging.judge(FAMILY, "LyCORIS", STEPS["every layer"]) is None
    reason = judging.judge(TF_FAMILY, "LyCORIS", STEPS["every layer"])
    assert reason is not None
    assert "must match the size of tensor" in reason
    model, subject = built(TF_FAMILY).model, built(TF_FAMILY)
    layers = peers.adaptable(model, subject)
    left_out = {name for name, layer in layers.items() if not peers.LycorisLora()._accepts(layer)}
    assert left_out == {name for name, layer in layers.items() if type(layer).__name__ == "Conv2dSame"}


def test_others_get_no_layer_that_convpeft_leaves_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU())
    subject = Subject(model, lambda model, images: images.sum(), bare=("1",))
    assert list(peers.adaptable(model, subject)) == ["0"]
    for library in (peers.PeftLora(), peers.LycorisLora()):
        assert library.adapters(library.attach(nn.Sequential(*model), subject)).keys() == {"0"}


def test_a_merge_of_peft_that_changes_outputs_is_seen(bench_of: BenchOf) -> None:
    """RTMDet's levels share convolutions, and peft wraps such a layer in one of its places alone."""
    bench = bench_of("libreyolo-rtmdet", peers.PeftLora())
    shared = [name for name, module in bench.subject.model.named_modules(remove_duplicate=False) if "cls_convs" in name]
    assert len(shared) > len({id(bench.subject.model.get_submodule(name)) for name in shared})
    with pytest.raises(AssertionError, match="largest difference"):
        STEPS["merge"](bench)


def test_a_table_has_a_mark_for_each_library_and_counts_below() -> None:
    results = {
        (library, name, step): None for library in judging.LIBRARIES for name in ("one", "two") for step in STEPS
    }
    results["peft", "two", "merge"] = results["LyCORIS", "two", "merge"] = "ValueError: no"
    results["LyCORIS", "one", "merge"] = "ValueError: no"
    lines = page.table(results).splitlines()
    assert lines[2] == "| one | " + " | ".join("✓✓✗" if step == "merge" else "✓✓✓" for step in STEPS) + " |"
    assert lines[3] == "| two | " + " | ".join("✓✗✗" if step == "merge" else "✓✓✓" for step in STEPS) + " |"
    assert (
        lines[4]
        == "| **of 2** | " + " | ".join("2 · 1 · 0" if step == "merge" else "2 · 2 · 2" for step in STEPS) + " |"
    )


def test_reasons_are_listed_once_with_where_they_held() -> None:
    results: judging.Results = {("x", name, step): None for name in ("one", "two") for step in STEPS}
    assert page.failures(results, "x") == "Nothing failed."
    results["x", "two", "merge"] = results["x", "two", "eject"] = "ValueError: groups=7 is odd. It is. And more."
    assert page.failures(results, "x") == "- *merge, eject* of two: `ValueError: groups=G is odd. It is`"
    assert page.failures(results, "y") == "Nothing failed."


def test_the_page_is_about_every_family_and_step_and_convpeft_passes_all() -> None:
    part = PAGE.split("## Results")[1].split("## What failed")[0]
    header, _, *rows, counts = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    assert header == ["family", *STEPS]
    assert [name for name, *_ in rows] == list(FAMILIES)
    assert all(re.fullmatch("✓[✓✗]{2}", cell) for _, *cells in rows for cell in cells)
    assert all(cell.startswith(f"{len(FAMILIES)} · ") for cell in counts[1:])


def test_the_page_says_that_whole_models_take_lora_under_a_tenth_of_their_parameters() -> None:
    rows = [line for line in PAGE.splitlines() if "rank 4 |" in line]
    assert len(rows) == 3
    for row in rows:
        assert float(row.split("|")[5].removesuffix(" % ")) < 10
