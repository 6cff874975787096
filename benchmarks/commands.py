"""What all scripts share: their options, and what becomes of their results."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .reports import Grid, Report, Stopwatch, Table, Verdict, machine, markdown, verdict_table, write
from .runner import Case, Result, side_by_side
from .worlds import PRECISIONS, SCALES, Setting


def parser(text: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser of the options that every script has."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="timed samples of each case")
    made.add_argument("--warm-up", type=int, default=2, help="untimed rounds before them")
    made.add_argument("--seed", type=int, default=0, help="of weights, batch, and the order within a round")
    made.add_argument("--threads", type=int, default=None, help="of torch; its own choice if not given")
    made.add_argument("--json", type=Path, default=None, help="write the results here as well")
    return made


def add_model_options(made: argparse.ArgumentParser, *, scale: str = "s") -> None:
    """Add the options of scripts that run a detector."""
    made.add_argument("--scale", default=scale, choices=SCALES, help="of YOLO-World-v2")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--amp", default="off", choices=list(PRECISIONS), help="autocast's precision")
    made.add_argument("--compile", action="store_true", help="let torch.compile have the network")


def add_batch_options(made: argparse.ArgumentParser, *, images: int, size: int) -> None:
    """Add the options of scripts that run one batch."""
    made.add_argument("--images", type=int, default=images, help="in a batch")
    made.add_argument("--size", type=int, default=size, help="of an image, pixels, a multiple of 32")


def parsed(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options given, checked, and start the stopwatch; sets torch's threads."""
    options = made.parse_args(arguments)
    if options.rounds < 1 or options.warm_up < 0:
        made.error("--rounds must be at least 1 and --warm-up at least 0")
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        made.error("there is no GPU that torch can use")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.stopwatch = Stopwatch()
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    """Return the setting that the options ask for."""
    return Setting(options.device, options.amp, options.compile, options.seed)


def results_of(cases: Sequence[Case], options: argparse.Namespace) -> list[Result]:
    """Return the results of cases, measured side by side as the options say."""
    return side_by_side(cases, rounds=options.rounds, warm_up=options.warm_up, seed=options.seed)


def finish(
    script: str,
    options: argparse.Namespace,
    tables: Sequence[Table] = (),
    verdicts: Sequence[Verdict] = (),
    grids: Sequence[Grid] = (),
) -> Report:
    """Print all results, write them where ``--json`` says, and return them."""
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("stopwatch", "json")}
    words = _without_json(sys.argv[1:])
    report = Report(
        script=script,
        command=shlex.join(["python", "-m", f"benchmarks.{script}", *words]),
        settings=settings,
        when=options.stopwatch.when,
        machine=machine(options.stopwatch.load),
        tables=tuple(tables),
        verdicts=tuple(verdicts),
        grids=tuple(grids),
    )
    print(f"{report.machine}\n{report.settings}\n")
    for table in tables:
        print(f"{table.title}\n\n{markdown(table)}\n")
    for grid in grids:
        print(f"{grid.title}\n\n{grid.markdown()}\n")
    if verdicts:
        print(verdict_table(verdicts))
        print(
            *(f"{'PASS' if v.passed else 'FAIL'}  {v.row}: {v.value:.4g}, must {v.must:g}" for v in verdicts), sep="\n"
        )
    if options.json is not None:
        write(report, options.json)
    return report


def _without_json(words: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word != "--json" and not word.startswith("--json="):
            kept.append(word)
        skip = word == "--json"
    return kept
