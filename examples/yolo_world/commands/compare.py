"""All specs side by side on one data set, with full fine-tuning and head-only training: a table, and a plot.

    python -m examples.yolo_world compare --out runs/compare
    python -m examples.yolo_world compare --specs A.yaml B.yaml --baselines full --data DIR --weights W --out runs/ab

Every row sees the same images in the same order for the same number of steps. A row that is finished is kept in
``--out/rows/<name>/row.json``; the same command does what is missing and goes on with a row that was cut off.
``--out`` also gets ``table.md``, ``compare.json``, ``compare.png`` and each row's adapter file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save as safetensors_bytes
from torch import nn

import convpeft

from ..data.files import write_atomically
from ..training.guard import GuardSettings
from ..training.model import all_parameter_groups, copy_model, count_parameters, unfreeze_all
from ..training.scores import Scores, evaluate
from ..training.trainer import Curves, Trainer
from .options import ALIASES, SPECS
from .report import plain, readable_size, table, typed_command, versions
from .series import asked_for, needs_one_process, note_lines, parse_series, same_series, series_parser, train_in
from .session import CommandError, Data, Session, load_base, load_data, load_spec, open_session, run_command
from .train import CHECKPOINT, settings_of

FULL, HEAD = "full", "head"
TITLES = {FULL: "full fine-tuning", HEAD: "head only"}
HEAD_ONLY: dict[str, Any] = {
    "version": 1,
    "rules": [],
    "unfreeze": [{"match": ["@head.cls", "@head.reg"]}],
    "norm": "frozen",
}
FULL_LR = 1e-3
OWN = ("specs", "baselines")
"""Options that say which rows; the others say how each is made."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train, and what came out.

    Attributes:
        name: of the spec's file, or ``full`` or ``head``.
        scores, best: at the last step, and where mAP50-95 was highest.
        trainable: number of trained parameters.
        share: the same as a part of the base's parameters.
        steps: optimizer steps.
        lr: learning rate.
        seconds_per_step: mean time, data loading included.
        file_bytes: size of the file that holds what was trained.
        loss: mean of the first and of the last tenth of the steps.
        skipped, returns: steps the guard left out, and its returns to an earlier state.
        reloads: whether the file on a fresh base gives the same scores; None where there is no adapter file.
        merge: how it merges, in words.
        spec: as plain data; None for full fine-tuning.
    """

    name: str
    scores: Scores
    best: Scores
    trainable: int
    share: float
    steps: int
    lr: float
    seconds_per_step: float
    file_bytes: int
    loss: tuple[float, float]
    skipped: int
    returns: int
    reloads: bool | None
    merge: str
    spec: dict[str, Any] | None

    @property
    def title(self) -> str:
        """Return the name as the table shows it."""
        return TITLES.get(self.name, self.name)


def read_row(path: Path, spec: dict[str, Any] | None) -> Row | None:
    """Return a finished row, or None if there is none.

    Raises:
        CommandError: if it is damaged, or was made with another spec.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data |= {"scores": Scores(**data["scores"]), "best": Scores(**data["best"]), "loss": tuple(data["loss"])}
        row = Row(**data)
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is damaged ({error}); delete its folder to make that row anew.") from error
    if row.spec != spec:
        raise CommandError(
            f"{path} was made with another spec than the file holds now; delete its folder to make it anew."
        )
    return row


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the first and of the last tenth of the losses that are finite."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [math.nan]
    count = max(len(finite) // 10, 1)
    return sum(finite[:count]) / count, sum(finite[-count:]) / count


def best_of(curves: Curves) -> Scores:
    """Return the scores of the evaluation with the highest mAP50-95."""
    return max((scores for _, scores in curves.scores), key=lambda scores: scores.map50_95)


def describe_merge(model: nn.Module, adapted: Scores, data: Data, batch_size: int) -> str:
    """Return how a model's active adapter merges: the forms and the merged model's mAP50-95, or what stays and why."""
    plan = convpeft.plan_merge(model)
    forms = Counter(row.form for row in plan.rows)
    counted = ", ".join(f"{forms[form]} {form}" for form in ("absorbed", "single", "factored", "kept") if forms[form])
    if plan.refused:
        reasons = Counter(reason.split(";")[0] for reason in plan.refused.values())
        return f"{counted or 'nothing'}; kept because: {'; '.join(reasons)}"
    merged = evaluate(convpeft.merge(model), data.test, data.texts, batch_size=batch_size)
    same = "the same scores" if merged == adapted else f"mAP50-95 {merged.map50_95:.4f} for {adapted.map50_95:.4f}"
    return f"whole: {counted or 'unfrozen weights only'}; {same}"


def adapter_row(
    name: str, spec: convpeft.Spec, args: argparse.Namespace, session: Session, data: Data, base: nn.Module, lr: float
) -> Row:
    """Train, save, reload and merge one spec's adapter, and return its row."""
    folder = args.out / "rows" / name
    model, outcome = train_in(folder, args, session, data, base, spec, title=name, lr=lr)
    share = outcome.trainable / convpeft.summary(model).base_parameters
    del model
    scores, file = outcome.curves.scores[-1][1], folder / "last.safetensors"
    fresh = copy_model(base)
    convpeft.load_adapter(fresh, file)
    again = evaluate(fresh, data.test, data.texts, batch_size=args.batch_size)
    merge = describe_merge(fresh, again, data, args.batch_size)
    guard = outcome.log["guard"]
    return Row(
        name, scores, best_of(outcome.curves), outcome.trainable, share, len(outcome.curves.losses), lr,
        outcome.curves.seconds / len(outcome.curves.losses), file.stat().st_size, ends(outcome.curves.losses),
        guard["skipped"], guard["returns"], again == scores, merge, spec.to_dict(),
    )  # fmt: skip


def full_row(args: argparse.Namespace, session: Session, data: Data, base: Any) -> Row:
    """Fine-tune every parameter of a copy of the base (but the head's fixed sum), without convpeft, and return the row."""
    folder = args.out / "rows" / FULL
    folder.mkdir(parents=True, exist_ok=True)
    model = unfreeze_all(copy_model(base))
    groups = all_parameter_groups(model, lr=args.full_lr, weight_decay=args.weight_decay)
    trainable, total = count_parameters(model)
    file = folder / "last.safetensors"

    def keep(which: str) -> None:
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        write_atomically(folder / f"{which}.safetensors", safetensors_bytes(tensors))

    trainer = Trainer(
        model, groups, data.train, data.texts, settings_of(args, len(data.train), 1), accelerator=session.accelerator,
        guard=GuardSettings(args.guard_streak, args.guard_lower, spike=args.guard_spike), keep=keep,
        measure=lambda current: evaluate(current, data.test, data.texts, batch_size=args.batch_size),
        say=note_lines(folder / "log.txt"),
    )  # fmt: skip
    if (folder / CHECKPOINT).is_file():
        trainer.resume(folder / CHECKPOINT)
    curves = trainer.run(folder / CHECKPOINT)
    return Row(
        FULL, curves.scores[-1][1], best_of(curves), trainable, trainable / total, len(curves.losses), args.full_lr,
        curves.seconds / len(curves.losses), file.stat().st_size, ends(curves.losses), trainer.guard.skipped,
        trainer.guard.returns, None, "–", None,
    )  # fmt: skip


def markdown_table(base: Scores, rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, below the base's scores."""
    titles = ("training", "trainable", "share", "mAP50", "mAP50-95", "loss, first to last", "s/step", "file", "skipped", "reloads", "merge")  # fmt: skip
    cells = [["base, untouched", "0", "0 %", f"{base.map50:.3f}", f"{base.map50_95:.3f}", *["–"] * (len(titles) - 5)]]
    for row in rows:
        reloads = "–" if row.reloads is None else "exactly" if row.reloads else "NOT THE SAME"
        cells.append([
            row.title, f"{row.trainable:,}", f"{100 * row.share:.2f} %", f"{row.scores.map50:.3f}", f"{row.scores.map50_95:.3f}",
            f"{row.loss[0]:.3g} to {row.loss[1]:.3g}", f"{row.seconds_per_step:.2f}", readable_size(row.file_bytes),
            str(row.skipped), reloads, row.merge,
        ])  # fmt: skip
    return table(titles, cells)


def save_plot(path: Path, base: Scores, rows: Sequence[Row]) -> None:
    """Write the plot of mAP50 and mAP50-95 against trainable parameters, the base as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(15, 5.5), layout="constrained")
    markers = {FULL: "*", HEAD: "s"}
    for each, key, title in zip(axes, ("map50", "map50_95"), ("mAP50", "mAP50-95"), strict=True):
        for number, row in enumerate(rows):
            value = getattr(row.scores, key)
            each.scatter(row.trainable, value, marker=markers.get(row.name, "o"), s=50, color=f"C{number % 10}",
                         edgecolors="black" if number >= 10 else "none", label=row.title)  # fmt: skip
        each.axhline(getattr(base, key), color="grey", linestyle="--", linewidth=1, label="base, untouched")
        each.set(xscale="log", xlabel="trainable parameters", ylabel=title, title=f"{title} on the test images")
        each.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.xaxis.set_major_formatter(EngFormatter(sep=""))
        each.xaxis.set_minor_formatter(NullFormatter())
        each.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def default_specs() -> list[Path]:
    """Return the spec files that come with the example, by name."""
    return sorted(SPECS.glob("*.yaml"))


def head_only() -> convpeft.Spec:
    """Return the spec that trains the class and box branches of the head, and nothing else."""
    return convpeft.Spec.from_dict({**HEAD_ONLY, "aliases": alias_names()})


def alias_names() -> dict[str, Any]:
    """Return the named positions of ultralytics' models."""
    return yaml.safe_load(ALIASES.read_text(encoding="utf-8"))["aliases"]


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = series_parser(
        "compare", "Train all specs, full fine-tuning and head only on one data set. It takes train's options too.",
        out=Path("runs/compare"), without=("spec",),
    )  # fmt: skip
    add = parser.add_argument_group("comparison").add_argument
    add("--specs", type=Path, nargs="+", metavar="FILE", help="spec files (default: all of specs/)")
    add(
        "--baselines",
        nargs="*",
        choices=(FULL, HEAD),
        default=(FULL, HEAD),
        help="rows without adapters (default: both)",
    )
    add("--full-lr", type=float, default=FULL_LR, help=f"learning rate of both baselines (default {FULL_LR:g})")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    args = parse_series(parser, arguments)
    args.specs = tuple(args.specs or default_specs())
    args.baselines = tuple(dict.fromkeys(args.baselines))
    names = [path.stem for path in args.specs]
    twice = sorted({name for name in names if names.count(name) > 1 or name in TITLES})
    if not 0 < args.full_lr < math.inf:
        parser.error("--full-lr must be above 0")
    if twice:
        parser.error(f"--specs: {twice[0]} names two rows; rename a file")
    return args


def load_specs(args: argparse.Namespace, base: nn.Module) -> dict[str, convpeft.Spec]:
    """Return the specs by name, each planned on the base first, so that a wrong one is found before anything trains."""
    specs = {path.stem: load_spec(path, args.aliases) for path in args.specs}
    if HEAD in args.baselines:
        specs[HEAD] = head_only()
    for name, spec in specs.items():
        try:
            convpeft.plan(base, spec)
        except convpeft.SpecError as error:
            raise CommandError(f"spec {name} does not fit this model, and nothing was trained: {error}") from error
    return specs


def finish(args: argparse.Namespace, data: Data, base_title: str, bare: Scores, rows: Sequence[Row]) -> dict[str, Any]:
    """Write table and JSON of the rows there are, and return what the JSON holds."""
    ordered = sorted(rows, key=lambda row: (row.name in TITLES, row.trainable))
    notes = (
        f"Data: {data.source}; {len(data.train)} images train, {len(data.test)} others test. Base: {base_title}. Text features: "
        f"{data.features.source}. Seed {args.seed}. Scores are those of the last step; nothing was chosen by them."
    )
    command = typed_command()
    results = {
        "base": bare, "rows": ordered, "data": data.source, "base_title": base_title, "texts": data.features.source,
        "options": vars(args), "versions": versions(), "threads": torch.get_num_threads(), "command": command,
        "seconds": sum(row.seconds_per_step * row.steps for row in ordered),
    }  # fmt: skip
    write_atomically(args.out / "table.md", f"{notes}\n\n{markdown_table(bare, ordered)}\n".encode())
    write_atomically(args.out / "compare.json", (json.dumps(plain(results), indent=1) + "\n").encode())
    return results


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what ``compare.json`` holds."""
    session = open_session(args)
    needs_one_process(session, "compare")
    same_series(args.out / "options.json", asked_for(args, free=(*OWN, "spec")))
    data = load_data(args, session.say)
    base = load_base(args, data.features, session)
    specs = load_specs(args, base.model)
    names = [*specs, *([FULL] if FULL in args.baselines else [])]
    bare = evaluate(base.model, data.test, data.texts, batch_size=args.batch_size)
    session.say(f"base: mAP50 {bare.map50:.3f}, mAP50-95 {bare.map50_95:.3f}")
    rows: list[Row] = []
    for number, name in enumerate(names, 1):
        path = args.out / "rows" / name / "row.json"
        row = read_row(path, specs[name].to_dict() if name in specs else None)
        kept = " (kept from an earlier run)" if row else ""
        if row is None:
            session.say(f"row {number} of {len(names)}: {name}")
            if name == FULL:
                row = full_row(args, session, data, base.model)
            else:
                row = adapter_row(
                    name, specs[name], args, session, data, base.model, args.full_lr if name == HEAD else args.lr
                )
            write_atomically(path, (json.dumps(plain(row), indent=1) + "\n").encode())
            (path.parent / CHECKPOINT).unlink(missing_ok=True)
        rows.append(row)
        session.say(
            f"row {number} of {len(names)}: {name}: mAP50 {row.scores.map50:.3f}, mAP50-95 {row.scores.map50_95:.3f}{kept}"
        )
        results = finish(args, data, base.source, bare, rows)
    save_plot(args.out / "compare.png", bare, results["rows"])
    print(f"\n{(args.out / 'table.md').read_text(encoding='utf-8')}", flush=True)
    session.say(f"table, plot and adapter files are in {args.out}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)
