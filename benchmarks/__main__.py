"""Run every benchmark, each in a process of its own, and write docs/benchmarks.md and docs/benchmarks-detail.md.

``python -m benchmarks`` takes about half an hour on 2 CPU cores; ``--only`` runs some, ``--render`` none. With
``--device cuda`` the GPU's part runs, and the pages show both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .page import RESULTS, render
from .reports import ROOT

CPU: dict[str, list[str]] = {
    "import_time": [],
    "acceptance": [],
    "hot_spots": [],
    "hot_spots-l": ["--scale", "l", "--rounds", "3", "--cases", "convpeft LoRA r=8, every conv"],
    "training_step": ["--all", "--rounds", "5"],
    "training_step-m": ["--scale", "m", "--rounds", "3", "--warm-up", "1"],
    "training_step-l": ["--scale", "l", "--rounds", "3", "--warm-up", "1"],
    "inference": [],
    "handling": ["--scale", "l", "--rounds", "5", "--warm-up", "1"],
    "growth": ["--rounds", "3", "--warm-up", "1"],
}
GPU_OPTIONS = ["--device", "cuda", "--amp", "bfloat16"]
GPU_STEP = [*GPU_OPTIONS, "--scale", "l", "--images", "16", "--size", "640", "--warm-up", "5"]
CUDA: dict[str, list[str]] = {
    "acceptance": [*GPU_OPTIONS, "--rounds", "15", "--warm-up", "5"],
    "training_step": [*GPU_STEP, "--all"],
    "training_step-compiled": [*GPU_STEP, "--compile"],
    "hot_spots": GPU_STEP,
    "inference": [*GPU_OPTIONS, "--scale", "l", "--images", "16", "--warm-up", "5"],
    "inference-compiled": [*GPU_OPTIONS, "--scale", "l", "--images", "16", "--warm-up", "5", "--compile"],
    "growth": [*GPU_OPTIONS, "--size", "640", "--sizes", "320", "640", "960", "--parts", "scale", "rank", "size"],
}


def command_of(job: str, device: str, results: Path) -> list[str]:
    """Return the command line of a job; it writes ``<job>.json``, or ``<job>@cuda.json`` for a GPU."""
    script, options = job.partition("-")[0], (CUDA if device == "cuda" else CPU)[job]
    target = results / f"{job}{'@cuda' if device == 'cuda' else ''}.json"
    return [sys.executable, "-m", f"benchmarks.{script}", *options, "--json", str(target)]


def main() -> int:
    """Run, render, and name what failed; a missed row of the acceptance table is a result and no failure."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted({*CPU, *CUDA}), help="run these")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--render", action="store_true", help="run nothing; write the pages from the results there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    failed = []
    for job in () if options.render else CUDA if options.device == "cuda" else CPU:
        if options.only and job not in options.only:
            continue
        command = command_of(job, options.device, options.results)
        print(f"\n== {job}: {' '.join(command[1:])}", flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        if code and not (job == "acceptance" and code == 1):
            failed.append(f"{job} (exit status {code})")
    print(f"wrote {', '.join(map(str, render(options.results)))}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
