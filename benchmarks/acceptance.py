"""Judge convpeft by the acceptance table: for each row pass or fail, what was asked for, what was measured.

All rows are medians of cases that ran side by side, relative to the baseline of the same round, on the wall clock. On a
CPU: YOLO-World-v2-S at 4×256², its large sister for two rows, forward passes at 1×640². With ``--device cuda``: the
step's rows on L at 16×640² with autocast. Example: ``python -m benchmarks.acceptance --only step swap``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from .commands import add_model_options, finish, parsed, parser, results_of, setting_of
from .handling import inject_cases, swap_cases
from .import_time import installed
from .import_time import measured as import_table
from .inference import ADAPTED, AGAIN, FACTORED, MERGED, acceptance_choices
from .inference import measured as inference_results
from .reports import Table, Verdict, shown
from .runner import Result
from .training_step import FULL, HEAD, LORA, NECK, PEER, PEER_NECK, REP_MONA, choices
from .training_step import measured as step_results
from .worlds import Setting, base_model, batch_of, title_of

PARTS = ("step", "large", "inference", "swap", "import", "inject")
NOISE = 1.02  # what still counts as 1.00 where two copies of the base agree better than that


@dataclass(frozen=True)
class Row:
    """A row about the training step.

    Attributes:
        text: of the row.
        case, peer: whose result is judged, and whose is shown beside it.
        must, aim: bounds, for S and for L.
        saved: judge the bytes kept for backward and not the time.
    """

    text: str
    case: str
    peer: str
    must: tuple[float, float]
    aim: tuple[float, float]
    saved: bool = False


STEP_ROWS = (
    Row("step time, LoRA r=8 on every conv ÷ full", LORA, PEER, (0.90, 0.80), (0.78, 0.70)),
    Row("step time, LoRA r=8 on neck and head ÷ full", NECK, PEER_NECK, (0.65, 0.65), (0.60, 0.60)),
    Row("step time, Rep-MoNA r=8 3/5/7, neck and head ÷ full", REP_MONA, PEER_NECK, (0.75, 0.75), (0.65, 0.65)),
    Row("kept for backward, LoRA on every conv ÷ full", LORA, PEER, (0.65, 0.65), (0.42, 0.42), saved=True),
    Row("kept for backward, LoRA on neck and head ÷ full", NECK, PEER_NECK, (0.28, 0.28), (0.20, 0.20), saved=True),
)


def by_name(results: Sequence[Result]) -> dict[str, Result]:
    """Return results by the names of their cases."""
    return {result.name: result for result in results}


def step_verdict(row: Row, results: Sequence[Result], where: str, *, large: bool) -> Verdict:
    """Return the verdict on one row about the training step."""
    found = by_name(results)
    own, full, peer = found[row.case], found[FULL], found.get(row.peer)
    must, aim = row.must[large], row.aim[large]
    if row.saved:
        value = low = high = own.saved_ratio if own.saved_ratio is not None else float("nan")
        figures = [f"{(r.saved_bytes or 0) / 1e6:.1f} MB" for r in (own, full)]
        beside = None if peer is None else peer.saved_ratio
    else:
        value, (low, high) = own.ratio, own.quartiles
        figures = [f"{shown(r.seconds)}" for r in (own, full)]
        figures[1] += f", CPU time ÷ {own.cpu_ratio:.2f}"
        beside = None if peer is None else peer.ratio
    detail = f"{figures[0]} of {figures[1]}" + ("" if beside is None else f"; peft's LoRA {beside:.2f}")
    return Verdict(f"{row.text}, {where}", must, aim, value, low, high, detail)


def step_part(
    scale: str, images: int, size: int, setting: Setting, options: argparse.Namespace, rows: Sequence[Row]
) -> tuple[Table, list[Verdict]]:
    """Return the results and verdicts of the training step."""
    names = dict.fromkeys([HEAD, *(row.peer for row in rows), *(row.case for row in rows)])
    wanted = {name: choices(False)[name][1] for name in names}
    base, batch = base_model(scale, setting), batch_of(images, size, setting)
    results = step_results(base, wanted, batch, setting, options)
    where = f"{scale.upper()}, {images}×{size}²"
    verdicts = [step_verdict(row, results, where, large=scale == "l") for row in rows]
    return Table(f"Training step, {title_of(scale, images, size)}", tuple(results)), verdicts


def bounded(row: str, must: float, aim: float, result: Result, base: str) -> Verdict:
    """Return the verdict on a case's time relative to its baseline."""
    detail = f"{shown(result.seconds)}, {base}; CPU time ÷ {result.cpu_ratio:.2g}"
    return Verdict(row, must, aim, result.ratio, *result.quartiles, detail)


def noise_bound(again: Result) -> float:
    """Return what counts as 1.00: the upper quartile of a second copy of the base, and no less than ``NOISE``."""
    return max(NOISE, again.quartiles[1])


def inference_part(size: int, setting: Setting, options: argparse.Namespace) -> tuple[Table, list[Verdict]]:
    """Return the results and verdicts of the forward pass."""
    base, images = base_model("s", setting), batch_of(1, size, setting)["img"]
    rounds = 2 * options.rounds + 1
    results = inference_results(base, acceptance_choices(), images, setting, rounds=rounds, warm_up=options.warm_up)
    found = by_name(results)
    base_time = f"base {shown(results[0].seconds)}"
    verdicts = [
        bounded(
            "merged ÷ base, same size (LoRA on every conv)", noise_bound(found[AGAIN]), 1.0, found[MERGED], base_time
        ),
        bounded("merged ÷ base, Rep-MoNA r=16 in the neck, factored", 1.05, 1.03, found[FACTORED], base_time),
        bounded("adapted, unmerged ÷ base, LoRA on every conv", 1.15, 1.08, found[ADAPTED], base_time),
    ]
    return Table(f"One forward pass, {title_of('s', 1, size)}", tuple(results)), verdicts


def swap_part(size: int, setting: Setting, options: argparse.Namespace) -> tuple[Table, list[Verdict]]:
    """Return the results and verdict of switching between two adapters."""
    results = results_of(swap_cases(base_model("s", setting), size, setting), options)
    own = next(result for result in results if result.name.startswith("convpeft"))
    verdict = bounded(f"swap ÷ one forward pass at {size}²", 0.01, 0.001, own, f"pass {shown(results[0].seconds)}")
    return Table(f"Swap next to a forward pass, YOLO-World-v2-S, LoRA on every conv, 1×{size}²", tuple(results)), [
        verdict
    ]


def import_part(options: argparse.Namespace) -> tuple[Table, list[Verdict]]:
    """Return the results and verdict of the import; the one row in seconds."""
    table = import_table(installed(), rounds=min(5, options.rounds), seed=options.seed)  # peers take long
    found = by_name(table.results)
    own, peer = found["import convpeft"], found.get("import peft")
    low, high = (own.seconds * edge / own.ratio for edge in own.quartiles)
    detail = f"{shown(own.seconds)}" + ("" if peer is None else f"; peft {shown(peer.seconds)}")
    return table, [Verdict("import convpeft, seconds over import torch", 0.2, 0.1, own.seconds, low, high, detail)]


def inject_part(scale: str, setting: Setting, options: argparse.Namespace) -> tuple[Table, list[Verdict]]:
    """Return the results and verdict of putting adapters in."""
    results = results_of(inject_cases(base_model(scale, setting)), options)
    own, theirs = by_name(results)["convpeft"], results[0]
    verdict = bounded(f"inject ÷ peft's, every conv, {scale.upper()}", 0.5, 0.2, own, f"peft {shown(theirs.seconds)}")
    return Table(f"inject, YOLO-World-v2-{scale.upper()}, LoRA r=8 on every conv", tuple(results)), [verdict]


def run(options: argparse.Namespace) -> tuple[list[Table], list[Verdict]]:
    """Return the results and verdicts of all parts asked for."""
    setting = setting_of(options)
    if options.device == "cuda":
        parts = [step_part(options.large, 16, 640, setting, options, STEP_ROWS)]
        return [table for table, _ in parts], [verdict for _, verdicts in parts for verdict in verdicts]
    size, images = (256, 4) if not options.tiny else (64, 1)
    forward = 640 if not options.tiny else 64
    makers = {
        "step": lambda: step_part(options.scale, images, size, setting, options, STEP_ROWS),
        "large": lambda: step_part(options.large, images, size, setting, options, STEP_ROWS[:1]),
        "inference": lambda: inference_part(forward, setting, options),
        "swap": lambda: swap_part(forward, setting, options),
        "import": lambda: import_part(options),
        "inject": lambda: inject_part(options.large, setting, options),
    }
    parts = [makers[part]() for part in PARTS if part in options.only]
    return [table for table, _ in parts], [verdict for _, verdicts in parts for verdict in verdicts]


def main() -> int:
    """Measure, judge and report; 1 if a row fails."""
    made = parser(__doc__, rounds=11)
    add_model_options(made)
    made.add_argument("--large", default="l", choices=("n", "s", "m", "l"), help="the model of the rows about L")
    made.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="these parts, on a CPU")
    made.add_argument("--tiny", action="store_true", help="small images, to try the script out; proves nothing")
    options = parsed(made)
    if options.device == "cuda" and options.amp == "off":
        options.amp = "bfloat16"  # the table asks for autocast there
    tables, verdicts = run(options)
    finish("acceptance", options, tables, verdicts)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
