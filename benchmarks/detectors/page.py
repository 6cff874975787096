"""Write docs/detectors.md: the table of families and steps, what failed and why, and what adapters add."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import convpeft

from .judging import LIBRARIES, Results
from .steps import RANK, STEPS, Convpeft, built
from .zoo import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "detectors.md"
PACKAGES = (
    *("torch", "torchvision", "transformers", "ultralytics", "libreyolo", "effdet", "timm"),
    *("segmentation-models-pytorch", "peft", "lycoris-lora"),
)
MARKS = {True: "✓", False: "✗"}


def table(results: Results) -> str:
    """Return all results as one Markdown table: in each cell a mark for each library, in the order of ``LIBRARIES``."""
    names = list(dict.fromkeys(name for _, name, _ in results))
    lines = [f"| family | {' | '.join(STEPS)} |", f"| --- |{' :---: |' * len(STEPS)}"]
    for name in names:
        cells = ["".join(MARKS[results[library, name, step] is None] for library in LIBRARIES) for step in STEPS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = [
        " · ".join(str(sum(results[library, name, step] is None for name in names)) for library in LIBRARIES)
        for step in STEPS
    ]
    return "\n".join([*lines, f"| **of {len(names)}** | {' | '.join(counts)} |"])


def failures(results: Results, library: str) -> str:
    """Return why a library fails where it does, as a Markdown list: what raised, or what the step found."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for (owner, name, step), reason in results.items():
        if owner == library and reason is not None:
            reasons.setdefault(_general(reason), {}).setdefault(name, []).append(step)
    lines = []
    for reason, where in reasons.items():
        by_steps: dict[tuple[str, ...], list[str]] = {}
        for name, steps in where.items():
            by_steps.setdefault(tuple(steps), []).append(name)
        places = "; ".join(f"*{', '.join(steps)}* of {', '.join(names)}" for steps, names in by_steps.items())
        lines.append(f"- {places}: `{reason}`")
    return "\n".join(lines) or "Nothing failed."


def _general(reason: str) -> str:
    """Return a reason without what differs from family to family, its first two sentences at most."""
    reason = re.sub(r"groups=\d+", "groups=G", reason)
    reason = re.sub(r"tensor (a|b) \(\d+\)", r"tensor \1 (N)", reason)
    reason = re.sub(r"handled for \w+Model", "handled for ...Model", reason)
    return ". ".join(reason.replace("`", "'").split(". ")[:2]).rstrip(".")


def sizes(names: Sequence[str]) -> str:
    """Return what LoRA on every adaptable layer adds to each family, as a Markdown table."""
    lines = [
        "| family | layers | base parameters | adapter parameters | share |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        subject = built(name)
        lines.append(_size(name, convpeft.plan(subject.model, Convpeft().spec(subject))))
    return "\n".join([*lines, *full_sizes()])


def full_sizes() -> list[str]:
    """Return rows for SSDLite and D-FINE as their users run them, with rank 4."""
    from transformers import DFineConfig, DFineForObjectDetection

    everything = {"rules": [{"match": "**", "kind": "lora", "rank": 4}]}
    convolutions = {"rules": [{"match": "**", "kind": "lora", "rank": 4, "only": ["Conv2d"]}]}
    ssdlite, d_fine = built("torchvision-ssdlite").model, DFineForObjectDetection(DFineConfig())
    return [
        _size("SSDLite320-MobileNetV3, all layers, rank 4", convpeft.plan(ssdlite, everything)),
        _size("D-FINE at its default size, all convolutions, rank 4", convpeft.plan(d_fine, convolutions)),
        _size("D-FINE at its default size, all layers, rank 4", convpeft.plan(d_fine, everything)),
    ]


def _size(name: str, plan: convpeft.Plan) -> str:
    share = 100 * plan.adapter_parameters / plan.base_parameters
    counts = f"{len(plan.layers)} | {plan.base_parameters:,} | {plan.adapter_parameters:,}"
    return f"| {name} | {counts} | {share:.1f} % |"


def exceptions(names: Sequence[str]) -> str:
    """Return which families' one rule leaves layers out, as a Markdown list."""
    by_patterns: dict[str, list[str]] = {}
    for name in names:
        for pattern in built(name).bare:
            by_patterns.setdefault(pattern, []).append(name)
    return "\n".join(f"- `!{pattern}`: {', '.join(where)}" for pattern, where in by_patterns.items())


def page(results: Results) -> str:
    """Return the whole of docs/detectors.md."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    steps = "\n".join(
        f"- **{name}**: {(step.__doc__ or '').strip().replace('``', '`')}" for name, step in STEPS.items()
    )
    return PAGE_TEXT.format(
        rank=RANK,
        steps=steps,
        versions=versions,
        exceptions=exceptions(list(FAMILIES)),
        table=table(results),
        convpeft=failures(results, "convpeft"),
        peft=failures(results, "peft"),
        lycoris=failures(results, "LyCORIS"),
        sizes=sizes(list(FAMILIES)),
    )


PAGE_TEXT = """# Detectors

`python -m benchmarks.detectors` wrote this page. Each family is built offline from its configuration with random
weights, small, and taken through the steps that the tests run (`benchmarks/detectors/steps.py`). The whole spec is one rule:

<!-- spec -->
```yaml
version: 1
rules:
  - {{match: "**", kind: lora, rank: {rank}}}
```

Some families add a pattern of what must stay, be it a fixed sum over bins that is written as a convolution (`dfl`), or
a layer whose weight `nn.MultiheadAttention` reads by itself, which convpeft refuses (`out_proj`). peft and LyCORIS leave
out the same layers.

{exceptions}

What the steps ask:

{steps}

Versions: {versions}.

## Results

In each cell: convpeft, `peft`'s LoRA, LyCORIS's LoCon, all of the same rank in the same run; ✓ passes, ✗ fails. The
last row counts the families that pass.

{table}

The tests also put Rep-MoNA on every convolution of each family: the same bits at the start, and a plain merged model that
is equal to 1e-12 in float64.

## What failed

Each library is at its best setting: where it refuses some layers or crashes on them, only *every layer* counts that, and
the other steps run on the layers it can adapt. How they are used is in `benchmarks/detectors/peers.py`.

**convpeft.** {convpeft}

**peft.** Left out where it is not about every layer: convolutions whose groups do not divide the rank, and dilated ones.
A model of transformers that has no word embeddings is told to say so, as peft's message asks. A layer that several
levels of a head share, as RTMDet's, is wrapped in one of its places alone, and a merge changes the others too; a model
whose `config` is a plain string, as some of libreyolo's are, does not merge. BatchNorm is left to the training loop, so
statistics move in training mode.

{peft}

**LyCORIS.** Left out where it is not about every layer: convolutions with a forward of their own, such as `Conv2dSame`,
whose padding it does not know. The base is frozen by hand. BatchNorm is left to the training loop as well.

{lycoris}

## Sizes

What the one rule adds at rank {rank} to the small models above, and at rank 4 to two whole ones. A depthwise layer's
adapter is about as large as the layer, at any rank, so depthwise families pay a floor; a small model's layers may be
narrower than an adapter.

{sizes}
"""
