"""One detector of several adapters: their weighted sum in weight space where that is exact, box fusion otherwise.

    python -m examples.yolo_world ensemble --adapter A B --out runs/both
    python -m examples.yolo_world ensemble --adapter A B C --coefficients 0.5 0.3 0.2 --method boxes --out DIR

In weight space the ensemble costs no more than one adapter: ``base + sum_i w_i (adapter_i - base)``, layer by layer, written
as a plain checkpoint (``merged.pt`` for ``--weights``, ``merged.safetensors``), and as one adapter (``adapter.safetensors``, by
``convpeft.combine``) where the sum is one. That is a sum of kernels, so it is exact for
every kind that is a convolution, and for unfrozen weights. Otherwise each adapter predicts on its own and the boxes are fused.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import convpeft
from convpeft import AdaptedModel
from convpeft.convolution.kernels import Chain, ConvKernel

from ..data.images import DetectionImages
from ..training.model import copy_model, use_classes
from ..training.scores import Report, predict, report
from .evaluate import markdown
from .merge import write_model
from .options import check_options, command_parser
from .proofs import check_merged, example_images
from .report import readable_size, versions, write_json
from .session import CommandError, load_adapters, load_base, load_data, open_session, run_command

LINEAR = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class NotExact(CommandError):
    """Adapters whose weighted sum is not exact in weight space: says on which layers and why."""


class Weighted(convpeft.Adapter):
    """An adapter times a coefficient: ``w f(x)``; its last kernel carries the ``w`` when it merges.

    Args:
        inner: the adapter, which stays as it is.
        coefficient: w.
    """

    kind = "weighted"

    def __init__(self, inner: convpeft.Adapter, coefficient: float) -> None:
        super().__init__(inner.site, inner.options)
        self.inner, self.coefficient, self.reads_host = inner, coefficient, inner.reads_host

    def forward(self, x: Tensor, host: Any = None) -> Tensor:
        """Return the adapter's update times the coefficient."""
        return self.coefficient * (self.inner(x, host) if self.reads_host else self.inner(x))

    def chain(self, host: ConvKernel | None = None) -> Chain:
        """Return the adapter's kernels, weight and bias of the last of them times the coefficient."""
        chain = self.inner.chain(host) if self.reads_host else self.inner.chain()
        last = chain[-1]
        bias = None if last.bias is None else self.coefficient * last.bias
        return (*chain[:-1], replace(last, weight=self.coefficient * last.weight, bias=bias))


def unfrozen_tensors(adapted: AdaptedModel, names: Sequence[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the tensors that adapters bring of unfrozen modules: by module, adapter (the base's own under ""), and tensor."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name in names:
        for key, tensors in adapted.unfrozen(name):
            found.setdefault(key, {"": adapted.tensors(key)})[name] = tensors
    return found


def why_not(module: nn.Module, versions_of: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Return why the weighted sum of a module's unfrozen tensors is not that of its outputs, or None if it is.

    A convolution or Linear is linear in weight and bias, and a norm in gain and shift, as long as its statistics are the same.
    """
    base = versions_of[""]
    changed = {
        tensor
        for name, tensors in versions_of.items()
        for tensor, value in tensors.items()
        if name and not torch.equal(value, base[tensor])
    }
    if not changed:
        return None
    if isinstance(module, LINEAR):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        moved = changed - {"weight", "bias", "num_batches_tracked"}
        return f"its statistics ({', '.join(sorted(moved))}) were adapted" if moved else None
    return f"it is not linear in its {', '.join(sorted(changed))}"


@torch.no_grad()
def sum_unfrozen(root: nn.Module, coefficients: Mapping[str, float]) -> None:
    """Write ``base + sum_i w_i (adapter_i - base)`` of all unfrozen tensors into the base, in place; the adapters lose theirs.

    Raises:
        NotExact: naming every module where that is not the weighted sum of outputs; nothing is changed then.
    """
    adapted = AdaptedModel.of(root)
    found = unfrozen_tensors(adapted, list(coefficients))
    problems = {key: reason for key, tensors in found.items() if (reason := why_not(adapted.module(key), tensors))}
    for key in found:
        if any(key in adapted.record(n).layers and adapted.adapter(key, n).reads_host for n in coefficients):
            problems[key] = "it is unfrozen and has an adapter that depends on its weight"
    if problems:
        raise NotExact(describe(problems))
    convpeft.set_active(root, None)
    for key, tensors in found.items():
        base = tensors[""]
        for tensor, value in base.items():
            if not value.is_floating_point():
                continue
            start = value.double()
            deltas = [w * (tensors[n][tensor].double() - start) for n, w in coefficients.items() if n in tensors]
            value.copy_(start + sum(deltas))
        for name in coefficients:
            if name in tensors:
                adapted.freeze_again(key, name)


def describe(problems: Mapping[str, str]) -> str:
    """Return the reasons why a sum is not exact, as a text."""
    lines = [f"{key or '(root)'}: {reason}" for key, reason in problems.items()]
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"the sum of these adapters is not exact in weight space. {'; '.join(lines[:4])}{more}"


def weigh(model: nn.Module, coefficients: Mapping[str, float]) -> None:
    """Make the model run the weighted sum of its adapters, in place: each layer adds ``sum_i w_i f_i(x)``.

    Raises:
        NotExact: if their unfrozen weights have no exact sum; the model is as it was.
    """
    adapted = AdaptedModel.of(model)
    sum_unfrozen(adapted.root, coefficients)
    for name, coefficient in coefficients.items():
        for key, adapter in adapted.adapters(name):
            adapted.replace(key, name, Weighted(adapter, coefficient).eval())
        adapted.record(name).norm = "frozen"
    convpeft.set_active(model, list(coefficients))


def sum_in_weight_space(model: nn.Module, coefficients: Mapping[str, float]) -> nn.Module:
    """Return a plain model: the base plus the weighted sum of its adapters; the given model stays as it is.

    Args:
        model: with all adapters in it.
        coefficients: by adapter name.

    Raises:
        NotExact: naming every layer where no exact sum exists, with the reason.
    """
    weighed = copy_model(model)
    weigh(weighed, coefficients)
    try:
        merged = convpeft.merge(weighed)
    except convpeft.MergeError as error:
        raise NotExact(describe(error.reasons)) from error
    check_merged(weighed, "auto", example_images(64).to(next(model.parameters()).device), strict=True)
    return merged


@dataclasses.dataclass(frozen=True)
class Fusion:
    """How boxes of several models become one list.

    Args:
        overlap: boxes of one class above this IoU are one.
        least: boxes below this confidence are left out first.
        limit: most boxes that stay for an image.
    """

    overlap: float = 0.55
    least: float = 0.005
    limit: int = 100


def fuse_boxes(found: Sequence[Tensor], weights: Sequence[float], size: int, fusion: Fusion = Fusion()) -> Tensor:
    """Return one image's boxes of several models as one list, ``(n, 6)``, most confident first: weighted boxes fusion.

    A group of boxes becomes their mean, weighted by confidence and by the models' weights; its confidence is low where few
    models agree.

    Args:
        found: for each model ``(n, 6)``: x1 y1 x2 y2 in pixels, confidence, class.
        weights: of the models, above 0.
        size: height and width of the image.
        fusion: see there.

    Raises:
        CommandError: if the package ensemble-boxes is missing.

    Reference: Solovyev et al., Weighted boxes fusion, arXiv:1910.13302.
    """
    try:
        from ensemble_boxes import weighted_boxes_fusion
    except ImportError as error:
        raise CommandError("box fusion needs ensemble-boxes: pip install 'convpeft[commands]'.") from error
    boxes, scores, labels = weighted_boxes_fusion(
        [(each[:, :4].double() / size).clamp(0, 1).tolist() for each in found],
        [each[:, 4].tolist() for each in found],
        [each[:, 5].long().tolist() for each in found],
        weights=list(weights), iou_thr=fusion.overlap, skip_box_thr=fusion.least,
    )  # fmt: skip
    parts = [
        torch.as_tensor(boxes).reshape(-1, 4) * size,
        torch.as_tensor(scores)[:, None],
        torch.as_tensor(labels)[:, None],
    ]
    fused = torch.cat([part.double() for part in parts], 1).float()
    return fused[fused[:, 4].argsort(descending=True, stable=True)][: fusion.limit]


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = command_parser(
        "ensemble",
        "One detector of several adapters: a weighted sum of their weights, or of their boxes.",
        out=Path("runs/ensemble"),
    )
    add = parser.add_argument_group("ensemble").add_argument
    add(
        "--coefficients",
        nargs="+",
        type=float,
        default=(),
        metavar="W",
        help="one per adapter (default: 1 / their number)",
    )
    add("--method", choices=("auto", "weights", "boxes"), default="auto",
        help="auto sums weights where that is exact and fuses boxes otherwise (default auto)")  # fmt: skip
    add("--overlap", type=float, default=Fusion.overlap, help="boxes above this overlap (IoU) are fused (default 0.55)")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is missing or out of range."""
    parser = make_parser()
    args = check_options(parser, parser.parse_args(arguments))
    if len(args.adapter) < 2:
        parser.error("--adapter wants two files or more")
    args.coefficients = tuple(args.coefficients) or (1 / len(args.adapter),) * len(args.adapter)
    if len(args.coefficients) != len(args.adapter):
        parser.error(f"--coefficients has {len(args.coefficients)} numbers for {len(args.adapter)} adapters")
    if not all(math.isfinite(value) for value in args.coefficients):
        parser.error("--coefficients must be finite numbers")
    if args.method == "boxes" and min(args.coefficients) <= 0:
        parser.error("--coefficients must be above 0 for --method boxes")
    if not 0 < args.overlap < 1:
        parser.error("--overlap must lie between 0 and 1")
    return args


def combine(
    args: argparse.Namespace, model: nn.Module, coefficients: Mapping[str, float]
) -> tuple[nn.Module | None, str]:
    """Return the plain sum, or None where boxes are fused instead; and a sentence that says why.

    Raises:
        NotExact: if --method weights asks for what is not exact.
        CommandError: if boxes have to be fused with a coefficient that is not above 0.
    """
    if args.method == "boxes":
        return None, "boxes are fused, as asked for"
    try:
        merged = sum_in_weight_space(model, coefficients)
    except NotExact as error:
        if args.method == "weights":
            raise
        if min(coefficients.values()) <= 0:
            raise CommandError(f"{error}. Box fusion, which is left, wants --coefficients above 0.") from error
        return None, f"boxes are fused: {error}"
    return merged, "weights are summed: every adapter is a sum of kernels"


def write_adapter(args: argparse.Namespace, session: Any) -> list[Path]:
    """Write the sum as one adapter file, where it is one: it can be switched beside others, as the merged weights cannot."""
    path: Path = args.out / "adapter.safetensors"
    try:
        done = convpeft.combine(args.adapter, args.coefficients, out=path, name="ensemble")
    except (convpeft.MergeError, convpeft.AdapterConflict, convpeft.AdapterFileError) as error:
        session.say(f"no adapter file of the sum: {str(error).splitlines()[0]}")
        return []
    session.say(str(done))
    return [done.path]


def run_all(
    args: argparse.Namespace, model: nn.Module, names: Sequence[str], merged: nn.Module | None, data: DetectionImages, texts: Tensor
) -> tuple[dict[str, Report], list[Tensor]]:  # fmt: skip
    """Return the reports of base, adapters and ensemble on the test images, and the ensemble's boxes."""
    found: dict[str, list[Tensor]] = {}
    for title, active in {"(base)": None, **{name: name for name in names}}.items():
        convpeft.set_active(model, active)
        found[title] = predict(model, data, texts, batch_size=args.batch_size, title=title)
    if merged is not None:
        boxes = predict(merged, data, texts, batch_size=args.batch_size, title="ensemble")
    else:
        fusion = Fusion(overlap=args.overlap)
        rows = zip(*(found[name] for name in names), strict=True)
        rows = tqdm(list(rows), desc="fuse boxes", unit="image", leave=False)
        boxes = [fuse_boxes(row, args.coefficients, data.size, fusion) for row in rows]
    return {title: report(each, data) for title, each in {**found, "ensemble": boxes}.items()}, boxes


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what ``ensemble.json`` holds."""
    session = open_session(args)
    data = load_data(args, session.say)
    model = load_base(args, data.features, session).model
    names = load_adapters(model, args.adapter)
    use_classes(model, data.texts).eval()
    coefficients = dict(zip(names, args.coefficients, strict=True))
    merged, why = combine(args, model, coefficients)
    session.say(why)
    reports, boxes = run_all(args, model, names, merged, data.test, data.texts)
    table = markdown(reports)
    print(f"\n{table}\n", flush=True)
    files = (
        [] if merged is None else write_model(use_classes(merged, data.texts), args.out) + write_adapter(args, session)
    )
    results: dict[str, Any] = {
        "method": "boxes" if merged is None else "weights", "why": why, "coefficients": coefficients, "reports": reports,
        "classes": data.classes, "options": vars(args), "versions": versions(),
        "boxes": [{"image": str(sample.image), "size": data.test.size, "boxes": each.tolist()}
                  for sample, each in zip(data.test.samples, boxes, strict=True)],
    }  # fmt: skip
    (args.out / "scores.md").write_text(f"{why}\n\n{table}\n", encoding="utf-8")
    write_json(args.out / "ensemble.json", results)
    sizes = "".join(f", {path} ({readable_size(path.stat().st_size)})" for path in files)
    session.say(f"written to {args.out}{sizes}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)
