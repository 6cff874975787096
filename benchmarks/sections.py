"""What the two pages of results say: their introductions, and a section for each job, in the order of the page."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One job's results on one page.

    Attributes:
        job: of ``benchmarks/__main__.py``; its results are in ``<job>.json`` and ``<job>@cuda.json``.
        title: the heading, to which a GPU's results add ``on a GPU``.
        text: the paragraph below it.
        verdicts, tables: whether the acceptance table is shown, and whether all other tables are.
    """

    job: str
    title: str
    text: str
    verdicts: bool = True
    tables: bool = True

    def heading(self, device: str) -> str:
        """Return the heading of the results of ``cpu`` or ``cuda``."""
        return f"{self.title} on a GPU" if device == "cuda" else self.title

    def anchor(self, device: str) -> str:
        """Return what a link to that heading ends in, as Markdown renderers make it.

        Example:
            >>> Section("hot_spots", "Where a step's time goes", "").anchor("cuda")
            'where-a-steps-time-goes-on-a-gpu'
        """
        return re.sub(r"[^\w\- ]", "", self.heading(device).lower()).replace(" ", "-")


@dataclass(frozen=True)
class Page:
    """A page of ``docs/``: its file, its title, what stands above the sections, and the sections."""

    file: str
    title: str
    about: str
    sections: tuple[Section, ...]


OVERVIEW = Page(
    "benchmarks.md",
    "Benchmarks",
    """The time and memory of a training step, and the time to inject, merge, save, load and switch adapters, next to full
fine-tuning, peft and LyCORIS.

## How it is measured

`make benchmarks` runs every script of `benchmarks/`, then writes this page and
[Benchmarks in detail](benchmarks-detail.md). `python -m benchmarks` does the same where the dependencies are installed.
`python -m benchmarks --render` runs nothing and writes the pages from the results in `benchmarks/results`. Each script
answers one question and takes `--help`.

* **Ratios.** All cases of a table run side by side in one process. Every round runs each case once, in random order. A
  case's ratio is its time divided by the baseline's time in the same round. The tables show the median of the ratios
  and, in brackets, the first and third quartile.
* **Time** is the median of a case's own times. On a busy machine, two such times divided by each other can differ from
  the ratio in the table.
* **CPU time ÷** is the same ratio for the CPU time of the process. Other processes disturb it less.
* **Kept for backward** is the most memory that autograd holds for the backward pass at one time. It is counted with
  `torch.autograd.graph.saved_tensors_hooks`. Each storage counts once; parameters do not count.
* **Peak** is the most memory that torch's allocator holds during a step, beyond what it held before the step:
  activations, gradients, buffers.
* A **training step** is the forward pass, the loss of ultralytics and the backward pass of YOLO-World-v2 with random
  weights. S, M and L are its sizes; 4×256² is a batch of 4 images of 256 × 256 pixels.
* **Full fine-tuning** trains every parameter except DFL's fixed sum. No adapter sits on that one either.
* **Peers** adapt the same convolutions at the same rank. Each runs with its fastest setting: BatchNorms of the frozen
  base in eval mode, no dropout, peft without its wrapper, LyCORIS in bypass mode.""",
    (
        Section(
            "acceptance",
            "Acceptance",
            "The limits that this project holds itself to. *Must be* is the limit; a row above it fails. *Aim* is the "
            "goal beyond the limit. Each row is judged by the median. The limit of *merged ÷ base, same size* is the noise of "
            "the run: the upper quartile of a second copy of the base, or 1.02 if that is larger.",
            tables=False,
        ),
        Section("training_step", "Training step", "Full fine-tuning, every kind of convpeft, and every peer."),
        Section(
            "handling",
            "Inject, eject, merge, save, load, swap",
            "convpeft merges in float64 and probes every layer. Its files carry digests of the base. The peers do neither.",
        ),
        Section("import_time", "Import", "Each sample is a fresh process that imports torch first."),
    ),
)
DETAIL = Page(
    "benchmarks-detail.md",
    "Benchmarks in detail",
    """Larger models, the profile of a training step, forward passes, and how time and memory grow.
[Benchmarks](benchmarks.md) has the acceptance table and the comparison with peers, and says
[how it is measured](benchmarks.md#how-it-is-measured).""",
    (
        Section("training_step-m", "Training step, M", "The usual cases on the next larger model."),
        Section("training_step-l", "Training step, L", "The usual cases on the large model."),
        Section("training_step-compiled", "Training step, compiled", "The network runs in `torch.compile`."),
        Section(
            "hot_spots",
            "Where a step's time goes",
            "torch's profiler over training steps: what adapters save and what they add, relative to full fine-tuning. "
            "Profiling lengthens small operations. Compare shares here, and take times from the tables of training steps.",
        ),
        Section(
            "hot_spots-l",
            "Where a step's time goes, L",
            "Of all rows of the acceptance table, LoRA's step on L has the least room. Five complete runs of the table on one "
            "machine (2026-11-25) gave 0.76, 0.80, 0.81, 0.76 and 0.79. The spread comes from full fine-tuning more than "
            "from LoRA. Full fine-tuning takes 0.94 to 1.00 s where each step gets its memory from the system anew. It "
            "takes 0.89 s where glibc is told to keep freed memory, and the row is then 0.81. The passes of the frozen model, "
            "forward and back to the input, are about two thirds of a full step. LoRA adds the convolutions of A and "
            "the products of both factors. These have few channels and run at a fraction of a large convolution's speed. "
            "The processor matters as much: those five runs were on an AMD EPYC. On an Intel Xeon with AVX-512 (2026-11-27) "
            "two runs gave 0.83 and 0.84 for this row, and 0.90 and 0.94 for the same on S; the code before the package was divided "
            "into rooms gave 0.84 and 0.93 in a run between them. "
            "There the frozen model alone takes 0.68 of full fine-tuning, and no choice of forms per layer saves more than 1 %.",
        ),
        Section(
            "inference",
            "Inference",
            "The base runs as two copies. How far the second copy is from 1.00 shows the noise of the run.",
        ),
        Section("inference-compiled", "Inference, compiled", "The network runs in `torch.compile`."),
        Section("growth", "Growth", "LoRA as the model, the rank, the images, or the number of adapters grow."),
        Section(
            "acceptance",
            "Behind the acceptance table",
            "The measurements that the rows of the [acceptance table](benchmarks.md) are judged by.",
            verdicts=False,
        ),
    ),
)
PAGES = (OVERVIEW, DETAIL)
