"""Measure how long ``import convpeft`` takes once torch is there.

Every sample is a fresh process that imports torch first and then one library, timed apart; the processes of a round run
in an order drawn anew. Example: ``python -m benchmarks.import_time --rounds 9``.
"""

from __future__ import annotations

import compileall
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from tqdm import tqdm

from .commands import finish, parsed, parser
from .reports import ROOT, Table
from .runner import Result, quartiles

LIBRARIES = ("convpeft", "peft", "lycoris")
PROGRAM = """
import contextlib, io, json, sys, time
start = time.perf_counter(), time.process_time()
import torch
middle, known = (time.perf_counter(), time.process_time()), len(sys.modules)
with contextlib.redirect_stdout(io.StringIO()):
    import {library}
end = time.perf_counter(), time.process_time()
times = [[b - a for a, b in zip(*pair)] for pair in ((start, middle), (middle, end))]
print(json.dumps({{"torch": times[0], "library": times[1], "modules": len(sys.modules) - known}}))
"""


def sample(library: str) -> dict:
    """Return the times of one fresh process: wall clock and CPU, of torch and of the library after it."""
    program = PROGRAM.format(library=library)
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measured(libraries: Sequence[str], *, rounds: int, warm_up: int = 1, seed: int = 0) -> Table:
    """Return a table of the seconds over ``import torch``, torch itself being the baseline."""
    compileall.compile_dir(ROOT / "convpeft", quiet=1)  # as pip does with the others when it installs them
    order, samples = random.Random(seed), {library: [] for library in libraries}
    for number in tqdm(range(warm_up + rounds), desc="rounds", disable=None):
        for library in order.sample(list(libraries), len(libraries)):
            found = sample(library)
            if number >= warm_up:
                samples[library].append(found)
    torch_times = [one["torch"] for found in samples.values() for one in found]
    rows = [_row("import torch", torch_times, torch_times)]
    for library, found in samples.items():
        rows.append(_row(f"import {library}", [one["library"] for one in found], [one["torch"] for one in found]))
    counts = ", ".join(f"{library} {found[0]['modules']:,}" for library, found in samples.items())
    return Table("import, after import torch, in fresh processes", tuple(rows), notes=(f"Modules loaded: {counts}.",))


def _row(name: str, own: list[list[float]], base: list[list[float]]) -> Result:
    ratios = [mine[0] / other[0] for mine, other in zip(own, base, strict=True)]
    cpu = [mine[1] / other[1] for mine, other in zip(own, base, strict=True)]
    medians = [statistics.median(times) for times in zip(*own, strict=True)]
    return Result(name, medians[0], medians[1], statistics.median(ratios), quartiles(ratios), statistics.median(cpu))


def installed() -> list[str]:
    """Return the libraries of ``LIBRARIES`` that are here."""
    return [library for library in LIBRARIES if find_spec(library)]


def main() -> None:
    """Measure and report."""
    options = parsed(parser(__doc__, rounds=7))
    table = measured(installed(), rounds=options.rounds, warm_up=options.warm_up, seed=options.seed)
    finish("import_time", options, [table])


if __name__ == "__main__":
    main()
