"""The benchmarks' own machinery, on toys: what is counted, what is written, how it is judged. No time is asserted."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import convpeft
from benchmarks import __main__ as everything
from benchmarks import acceptance, hot_spots, kinds, page, reports, sections, training_step
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.runner import Case, Result, quartiles, side_by_side

ROOT = Path(__file__).parents[2]
BIG = 4 * 64 * 64  # bytes of a 64×64 map


def toy() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64)), torch.randn(64, 64)


def step_of(model: nn.Module, x: torch.Tensor):
    def step() -> None:
        model(x).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def result(name: str, **changes) -> Result:
    return replace(Result(name, 1.0, 0.9, 1.0, (0.9, 1.1), 1.0), **changes)


def results_of_a_step() -> list[Result]:
    shared = {"saved_bytes": 10, "trainable": 1}
    return [
        result(training_step.FULL, saved_ratio=1.0, **shared),
        result(training_step.LORA, ratio=0.85, saved_ratio=0.7, **shared),
        result(training_step.PEER, ratio=1.1, saved_ratio=1.0, **shared),
    ]


def report(**changes) -> reports.Report:
    table = reports.Table("a table", tuple(results_of_a_step()), axis="rank", x=4, notes=("A note.",))
    verdict = reports.Verdict("a row", 0.9, 0.7, 0.8, 0.75, 0.85, "figures")
    grid = reports.Grid("a grid", ("what", "a"), (("x", "1"),), ("Another note.",))
    made = reports.Report("toy", "python -m toy", {"seed": "0"}, "now", reports.machine(1.5))
    return replace(made, **{"tables": (table,), "verdicts": (verdict,), "grids": (grid,), **changes})


def test_saved_bytes_of_a_known_model():
    model, x = toy()
    assert saved_bytes(step_of(model, x), [model]) == 2 * BIG  # the input, and the sigmoid's output, once
    model[0].requires_grad_(False)
    assert saved_bytes(step_of(model, x), [model]) == BIG  # the last layer's input alone


def test_parameters_count_as_saved_only_where_nobody_says_that_they_are_some():
    model, x = toy()
    assert saved_bytes(step_of(model, x)) == 2 * BIG + BIG  # and the last layer's weight


def test_what_is_let_go_in_between_does_not_add_up():
    x = torch.randn(64, 64, requires_grad=True)

    def step() -> None:
        for _ in range(5):
            torch.linalg.vector_norm(x + 1, dim=1).detach()

    assert BIG <= saved_bytes(step) < 2 * BIG


def test_what_a_backward_pass_saves_itself_counts():
    from torch.utils.checkpoint import checkpoint

    block, x = nn.Sequential(nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()), torch.randn(64, 64, requires_grad=True)

    def recomputing() -> None:
        checkpoint(block, x, use_reentrant=False).sum().backward()

    assert saved_bytes(recomputing) > 0
    assert peak_bytes(recomputing) >= 3 * BIG


def test_peak_bytes_hold_at_least_what_is_saved_and_the_gradients():
    model, x = toy()
    assert peak_bytes(step_of(model, x)) >= 2 * BIG  # sigmoid's output and both weights' gradients are alive together


def test_side_by_side_judges_every_case_by_the_first():
    model, x = toy()
    prepared = []
    cases = [
        Case("base", step_of(model, x), (model,), trains=True),
        Case("again", step_of(model, x), (model,), trains=True),
        Case("other", prepared.append, prepare=lambda: "fresh", repeat=2),
    ]
    base, again, other = side_by_side(cases, rounds=3, warm_up=1)
    assert [base.name, again.name, other.name] == ["base", "again", "other"]
    assert (base.ratio, base.quartiles, base.saved_ratio, base.peak_ratio) == (1.0, (1.0, 1.0), 1.0, 1.0)
    assert again.saved_bytes == base.saved_bytes == 2 * BIG
    assert base.trainable == sum(p.numel() for p in model.parameters())
    assert prepared == ["fresh"] * 8
    assert (other.saved_bytes, other.peak_bytes, other.trainable) == (None, None, None)
    assert again.quartiles[0] <= again.ratio <= again.quartiles[1]


def test_quartiles_of_one_value_are_that_value():
    assert quartiles([2.0]) == (2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_a_report_comes_back_from_json_as_it_was(tmp_path):
    written = report()
    reports.write(written, tmp_path / "deep" / "toy.json")
    assert reports.read(tmp_path / "deep" / "toy.json") == written


def test_a_machine_says_what_it_is():
    machine = reports.machine()
    assert machine["versions"]["torch"] == torch.__version__.partition("+")[0] or machine["versions"]["torch"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["load before"] is None


def test_tables_leave_out_what_nobody_measured():
    text = reports.markdown(reports.Table("t", (result("base"), result("other", seconds=0.002, ratio=0.012))))
    assert text.splitlines() == [
        "| case | time ÷ base (quartiles) | CPU time ÷ | time |",
        "| --- | ---: | ---: | ---: |",
        "| base | 1.00 (0.90–1.10) | 1.00 | 1.00 s |",
        "| other | 0.012 (0.90–1.10) | 1.00 | 2.00 ms |",
    ]
    assert "| kept for backward ÷ |" in reports.markdown(report().tables[0])
    assert reports.markdown(report().tables[0]).endswith("\n\nA note.")


@pytest.mark.parametrize(
    ("value", "passes", "word"),
    [(0.65, True, "pass, aim reached"), (0.9, True, "pass"), (0.901, False, "**fail**"), (math.nan, False, "**fail**")],
)
def test_a_row_passes_up_to_its_bound_and_never_without_a_number(value, passes, word):
    verdict = reports.Verdict("row", 0.9, 0.7, value, value, value, "")
    assert verdict.passed is passes
    assert f"| {word} |" in reports.verdict_table([verdict])


def test_rows_of_the_step_take_their_bounds_from_the_scale_and_their_value_from_the_case():
    time_row, saved_row = acceptance.STEP_ROWS[0], acceptance.STEP_ROWS[3]
    small = acceptance.step_verdict(time_row, results_of_a_step(), "S", large=False)
    large = acceptance.step_verdict(time_row, results_of_a_step(), "L", large=True)
    saved = acceptance.step_verdict(saved_row, results_of_a_step(), "S", large=False)
    assert (small.value, small.must, small.passed) == (0.85, 0.90, True)
    assert (large.value, large.must, large.passed) == (0.85, 0.80, False)
    assert (saved.value, saved.must, saved.passed) == (0.7, 0.65, False)
    assert "peft's LoRA 1.10" in small.detail


def test_one_is_met_within_the_noise_that_a_second_copy_of_the_base_shows():
    assert acceptance.noise_bound(result("again", quartiles=(0.99, 1.005))) == acceptance.NOISE
    assert acceptance.noise_bound(result("again", quartiles=(0.95, 1.04))) == 1.04


def test_every_operation_is_in_one_group():
    assert hot_spots.group_of("aten::_slow_conv2d_backward") == "convolutions, backward"
    assert hot_spots.group_of("aten::mkldnn_convolution") == "convolutions, forward"
    assert hot_spots.group_of("aten::baddbmm_") == "matrix products"
    assert hot_spots.group_of("aten::view") == hot_spots.REST


def test_a_profile_accounts_for_the_whole_step():
    model, x = toy()
    found = hot_spots.spent(Case("toy", step_of(model, x)), "cpu")
    assert sum(found[group] for group in (*hot_spots.GROUPS, hot_spots.REST)) >= found[hot_spots.TOTAL] * 0.999
    made = hot_spots.grid("t", ["toy", "toy again"], [[found, found]])
    assert [row[0] for row in made.rows][-2:] == [hot_spots.REST, hot_spots.TOTAL]


def test_specs_of_the_benchmarks_are_sound_and_leave_the_fixed_sum_alone():
    for name, (_, spec) in kinds.specs(True).items():
        assert convpeft.Spec.from_dict(spec, source=name).rules
        match = spec["rules"][0]["match"]
        assert name.endswith("blocks") or "!model.22.dfl.**" in match


def test_the_pages_show_every_result(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    growing = tuple(replace(report().tables[0], x=x) for x in (4, 8))
    reports.write(report(), results / "training_step.json")
    reports.write(report(grids=(), verdicts=()), results / "training_step@cuda.json")
    reports.write(report(tables=growing, grids=(), verdicts=()), results / "growth.json")
    reports.write(report(grids=(), verdicts=()), results / "training_step-m@cuda.json")
    overview, detail = (path.read_text(encoding="utf-8") for path in page.render(results, docs))
    text = overview + detail
    assert overview.index("## Training step\n") < overview.index("## Training step on a GPU\n")
    assert detail.index("## Growth\n") < detail.index("## Training step, M on a GPU\n")
    assert "| a row | ≤ 0.90 | 0.70 | 0.80 (0.75–0.85) | pass | figures |" in text
    assert "| what | a |" in text
    assert "`python -m toy`" in text
    for name in ("training-step-0", "training-step-cuda-0", "training-step-m-cuda-0", "growth-rank"):
        assert f"(pictures/benchmark-{name}.svg)" in text
        assert (docs / "pictures" / f"benchmark-{name}.svg").stat().st_size > 1000


def test_every_job_has_a_script_and_a_section():
    for device, jobs in (("cpu", everything.CPU), ("cuda", everything.CUDA)):
        for job in jobs:
            command = everything.command_of(job, device, Path("results"))
            assert (ROOT / "benchmarks" / f"{command[2].partition('.')[2]}.py").is_file()
            assert Path(command[-1]).name == (f"{job}@cuda.json" if device == "cuda" else f"{job}.json")
            assert job in {section.job for each in sections.PAGES for section in each.sections}


@pytest.mark.parametrize("shown", sections.PAGES, ids=lambda shown: shown.file)
def test_sections_of_a_page_have_anchors_of_their_own(shown):
    anchors = [section.anchor(device) for section in shown.sections for device in page.DEVICES]
    assert len(set(anchors)) == len(anchors)


def test_a_failed_row_links_to_the_profile_where_there_is_one(tmp_path):
    failed = replace(report().verdicts[0], value=0.95)
    reports.write(report(script="acceptance", verdicts=(failed,)), tmp_path / "acceptance.json")
    overview, detail = (path.read_text(encoding="utf-8") for path in page.render(tmp_path, tmp_path))
    assert "What keeps a step long: [Benchmarks in detail](benchmarks-detail.md)." in overview
    assert "[Behind the acceptance table](benchmarks-detail.md#behind-the-acceptance-table)" in overview
    assert "### a table" not in overview
    assert "**fail**" not in detail
    reports.write(report(tables=()), tmp_path / "hot_spots.json")
    overview = page.render(tmp_path, tmp_path)[0].read_text(encoding="utf-8")
    assert "[Where a step's time goes](benchmarks-detail.md#where-a-steps-time-goes)." in overview


def test_the_pages_are_those_that_the_results_give(tmp_path):
    if not list(page.RESULTS.glob("*.json")):
        pytest.skip("no results yet")
    for path in page.render(page.RESULTS, tmp_path):
        assert path.read_text(encoding="utf-8") == (page.DOCS / path.name).read_text(encoding="utf-8")
    pictures = [folder.glob("pictures/benchmark-*.svg") for folder in (tmp_path, page.DOCS)]
    assert {path.name for path in pictures[0]} == {path.name for path in pictures[1]}


def imported_names(source: str) -> set[str]:
    """Return the first part of every module that a source imports, at its top or later, by statement or by name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module if node.module and not node.level else "benchmarks")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names += [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    return {str(name).partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "source",
    ["import tests.cases", "def f():\n    from tests import cases", "importlib.import_module('tests.cases')"],
)
def test_an_import_of_tests_is_seen_wherever_it_stands(source):
    assert "tests" in imported_names(source)


def test_no_benchmark_imports_tests():
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert len(files) > 20
    assert not [str(file) for file in files if "tests" in imported_names(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("script", ["", ".acceptance", ".detectors"])
def test_help_costs_nothing(script):
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage:" in run.stdout
