"""Two adapters on one frozen YOLO-World, against full fine-tuning; then swapped and merged.

    python -m examples.yolo_world demo
    python -m examples.yolo_world demo --data DIR --weights yolov8s-worldv2.pt --categories screw bottle

``README.md`` beside this file explains the steps and the options.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import convpeft

from .commands.options import RUN_OPTIONS, TRAINING_OPTIONS, add_options, check_options
from .commands.pictures import save_comparison, save_curves
from .commands.proofs import MergeProof, SwapProof, predict_all, show_merge, show_swap
from .commands.report import Row, markdown_table, readable_size, summarise, typed_command, versions, write_json
from .commands.session import Data, load_base, open_session, run_command
from .data.augment import flip_and_relight
from .data.datasets import open_dataset
from .data.generate import DEFECTS, cached
from .data.images import DataError
from .data.mvtec import list_categories
from .data.surfaces import SURFACES
from .data.texts import load_texts
from .training.base import ADAPTER_CATEGORIES, BASE_CATEGORIES, Base, Recipe
from .training.guard import GIVE_UP
from .training.model import all_parameter_groups, copy_model, count_parameters, state_bytes, unfreeze_all
from .training.scores import Scores, evaluate, predict, score
from .training.trainer import Curves, Trainer, TrainSettings

QUICK = {"image_size": 96, "images": 5, "batch_size": 4, "base_steps": 10, "steps": 6, "evaluations": 1,
         "base_categories": BASE_CATEGORIES[:2]}  # fmt: skip
"""What ``--quick`` sets unless the option is given as well."""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.yolo_world demo",
        description="Train two adapters on one frozen YOLO-World, compare with full fine-tuning, swap and merge them.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="every step on a tiny scale, for tests; the numbers mean nothing")
    add("--categories", nargs="+", default=(), help="the two that get an adapter (default: the first two of --data)")
    add("--base-categories", nargs="+", default=BASE_CATEGORIES, metavar="NAME",
        help=f"generated categories the base learns without --weights (default {' '.join(BASE_CATEGORIES)})")  # fmt: skip
    add("--steps", type=int, default=150, help="steps of each adapter and of each full fine-tuning (default 150)")
    add("--base-lr", type=float, default=Recipe.lr, help="learning rate of the base's training (default %(default)s)")
    add("--adapter-lr", type=float, default=4e-3, help="learning rate of the adapters (default %(default)s)")
    add("--full-lr", type=float, default=1e-3, help="learning rate of full fine-tuning (default %(default)s)")
    add_options(parser, "data", ("data", "images", "image_size", "train_share", "min_area"))
    add_options(parser, "model", ("weights", "texts", "clip", "scale", "spec", "base_steps"))
    add_options(parser, "training", TRAINING_OPTIONS, evaluations=4)
    add_options(parser, "run", RUN_OPTIONS, out=Path("runs/demo"))
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(arguments)
    if not args.categories and args.data is None:
        args.categories = ADAPTER_CATEGORIES
    if args.categories and len(set(args.categories)) != 2:
        parser.error("--categories wants two different categories")
    unknown = sorted(set(args.base_categories) - set(SURFACES))
    if unknown:
        parser.error(
            f"no generated category {', '.join(unknown)} for --base-categories; there are {', '.join(SURFACES)}"
        )
    return check_options(parser, args)


class Demo:
    """One run: what it was asked, what all its steps share, and what they found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.rows: list[Row] = []
        self.curves: dict[str, Curves] = {}
        self.files: dict[str, Path] = {}
        self.session = open_session(args)
        self.say = self.session.say
        self.writer = SummaryWriter(args.out / "tensorboard")

    def close_phase(self, name: str) -> None:
        """Note the time since the last phase ended as this phase's."""
        self.phases[name] = round(time.perf_counter() - self.started - sum(self.phases.values()), 2)

    def read_data(self) -> list[Data]:
        """Return the two categories, each with its images and the text features of all."""
        args = self.args
        names = args.categories or tuple(list_categories(args.data)[:2])
        if len(names) < 2:
            raise DataError(f"{args.data} has one category only; the demo compares two (--categories A B).")
        root = args.data or cached(args.cache, names, images=args.images, seed=args.seed)
        found = [
            open_dataset(root, size=args.image_size, seed=args.seed, train_share=args.train_share, min_area=args.min_area,
                         categories=(name,), augmentation=flip_and_relight)
            for name in names
        ]  # fmt: skip
        labels = [label for splits in found for label in splits.classes]
        texts = load_texts([*DEFECTS, *labels], args.texts, clip=args.clip)
        source = f"{'your folder' if args.data else 'GENERATED, not photographs'}: {root}"
        self.say(f"data ({source}); text features {texts.source}")
        for splits in found:
            counts = f"{len(splits.train)} images train, {len(splits.test)} others test"
            self.say("; ".join([f"  {splits.title}: {counts}, classes {', '.join(splits.classes)}", *splits.notes]))
        return [Data(each.title, each.train, each.test, each.classes, texts, source) for each in found]

    def scores(self, model: nn.Module, tasks: Sequence[Data]) -> dict[str, Scores]:
        """Return the model's scores on the test images of each task."""
        return {task.title: evaluate(model, task.test, task.texts, batch_size=self.args.batch_size) for task in tasks}

    def learn(
        self, model: nn.Module, groups: list[dict[str, Any]], task: Data, title: str, extra_loss: Any = None
    ) -> Curves:
        """Train on one task, adapters and full fine-tuning alike, taking scores on the way; in place."""
        args = self.args
        size = min(args.batch_size, len(task.train))
        settings = TrainSettings(args.steps, size, args.accumulation, evaluations=args.evaluations, seed=args.seed)
        trainer = Trainer(
            model, groups, task.train, task.texts, settings, accelerator=self.session.accelerator, guard=GIVE_UP,
            measure=lambda current: evaluate(current, task.test, task.texts, batch_size=args.batch_size),
            extra_loss=extra_loss, writer=self.writer, title=title,
            say=lambda text: self.say(f"  {title}: {text}"),
        )  # fmt: skip
        self.curves[title] = trainer.run()
        return self.curves[title]

    def add_row(
        self, method: str, task: Data, tasks: Sequence[Data], model: nn.Module, curves: Curves, trained: tuple[int, int],
        file_bytes: int,
    ) -> None:  # fmt: skip
        """Add the row of a trained model; ``trained`` is how many parameters train, and of how many."""
        seconds, (trainable, total) = curves.seconds / len(curves.losses), trained
        self.rows.append(
            Row(method, task.title, self.scores(model, tasks), trainable, trainable / total, seconds, file_bytes)
        )

    def train_adapter(self, model: nn.Module, spec: convpeft.Spec, task: Data, tasks: Sequence[Data]) -> None:
        """Inject one more adapter into the shared frozen base, train it, save it, and add its row."""
        args = self.args
        convpeft.set_active(model, None) if self.files else None
        torch.manual_seed(args.seed)
        convpeft.inject(model, spec, name=task.title)
        convpeft.set_active(model, task.title)
        groups = convpeft.param_groups(model, lr=args.adapter_lr, weight_decay=args.weight_decay)
        curves = self.learn(model, groups, task, f"adapter {task.title}", convpeft.auxiliary_loss)
        state = convpeft.summary(model)
        path = convpeft.save_adapter(model, args.out / "adapters" / f"{task.title}.safetensors", name=task.title)
        self.files[task.title] = Path(path)
        counts = state.trainable_parameters, state.base_parameters
        self.add_row("adapter", task, tasks, model, curves, counts, path.stat().st_size)

    def train_full(self, base: nn.Module, task: Data, tasks: Sequence[Data]) -> None:
        """Fine-tune a copy of the base with every parameter, for the same number of steps, and add its row."""
        model = unfreeze_all(copy_model(base))
        groups = all_parameter_groups(model, lr=self.args.full_lr, weight_decay=self.args.weight_decay)
        curves = self.learn(model, groups, task, f"full {task.title}")
        self.add_row("full fine-tuning", task, tasks, model, curves, count_parameters(model), state_bytes(model))

    def take_base(self, tasks: Sequence[Data]) -> Base:
        """Return the base, frozen, and add its row."""
        args = self.args
        recipe = Recipe(
            args.scale, args.seed, args.base_categories, args.images, args.image_size, args.min_area, args.train_share,
            args.batch_size, args.accumulation, args.base_steps, args.base_lr, args.weight_decay, args.precision,
        )  # fmt: skip
        base = load_base(args, tasks[0].features, self.session, recipe)
        base.model.requires_grad_(False)  # torch's Linear may give other last bits where its weight trains
        if base.own is not None:
            own = f"mAP50 {base.own.map50:.3f}, mAP50-95 {base.own.map50_95:.3f}"
            self.say(f"  on test images of its own categories: {own}")
        self.rows.append(Row("base", None, self.scores(base.model, tasks), 0, 0.0, None, state_bytes(base.model)))
        return base

    def run(self) -> None:
        """Run the whole demo and write its output folder."""
        args = self.args
        self.say(f"seed {args.seed}, device {self.session.accelerator.device}, {torch.get_num_threads()} CPU threads")
        tasks = self.read_data()
        self.close_phase("data")
        base = self.take_base(tasks)
        self.close_phase("base")
        bare, boxes = base.model, {None: predict_all(base.model, tasks)}
        spec = convpeft.Spec.load(args.spec)
        plan = str(convpeft.plan(bare, spec))
        self.say(f"adapter specification {args.spec.name}, before anything is touched:\n{plan}")
        adapted = copy_model(bare)
        for task in tasks:
            self.train_adapter(adapted, spec, task, tasks)
            boxes[task.title] = predict_all(adapted, tasks)
        self.say(f"both adapters are in one model:\n{convpeft.summary(adapted)}")
        self.close_phase("adapters")
        for task in tasks:
            self.train_full(bare, task, tasks)
        self.close_phase("full fine-tuning")

        swap = show_swap(bare, self.files, tasks, boxes)
        self.say(
            f"swap: {' -> '.join(swap.order)} on a fresh base; all {len(boxes[None])} images gave each adapter's own boxes bit for "
            f"bit: {'yes' if swap.exact else 'NO'}"
        )
        merges, merge_plans = self.merge_all(adapted, tasks)
        self.close_phase("swap and merge")
        self.draw(tasks, boxes)
        self.close_phase("pictures")
        self.finish(base, tasks, swap, merges, plan, merge_plans)

    def merge_all(self, adapted: nn.Module, tasks: Sequence[Data]) -> tuple[dict[str, MergeProof], dict[str, str]]:
        """Merge each adapter into plain layers and compare; return the proofs and the merge plans."""
        proofs, plans = {}, {}
        for task in tasks:
            convpeft.set_active(adapted, task.title)
            plans[task.title] = str(convpeft.plan_merge(adapted))
            if len(plans) == 1:
                self.say(f"merge plan:\n{plans[task.title]}")
            merged, proof = show_merge(adapted, task)
            proofs[task.title] = proof
            merged_scores = score(predict(merged, task.test, task.texts), task.test)
            self.say(
                f"merge of {task.title}: plain layers only: {'yes' if proof.plain else 'NO'}; same boxes (confidence above 0.25): "
                f"{'yes' if proof.same_boxes else 'NO'}; largest difference {proof.largest_box_difference:.1e} there, before "
                f"suppression {proof.pixels:.1e} pixels and {proof.scores:.1e} in the scores, {proof.float64:.1e} relative in "
                f"float64; mAP50 {merged_scores.map50:.3f} merged"
            )
        return proofs, plans

    def draw(self, tasks: Sequence[Data], boxes: dict[str | None, list[Tensor]]) -> None:
        """Write the pictures: boxes side by side for each task, and the curves."""
        start = 0
        for task in tasks:
            own = slice(start, start + len(task.test))
            columns = {"base": boxes[None][own], f"adapter: {task.title}": boxes[task.title][own]}
            save_comparison(self.args.out / f"boxes_{task.title}.png", task.test, columns)
            start = own.stop
        base_scores = self.rows[0].scores
        starts = {title: base_scores[title.split(" ", 1)[1]].map50 for title in self.curves}
        save_curves(self.args.out / "curves.png", self.curves, starts=starts)

    def finish(
        self, base: Base, tasks: Sequence[Data], swap: SwapProof, merges: dict[str, MergeProof], plan: str,
        merge_plans: dict[str, str],
    ) -> None:  # fmt: skip
        """Write table and JSON, and print what came out."""
        args, names, texts = self.args, [task.title for task in tasks], tasks[0].features
        lines, table = summarise(self.rows, names, quick=args.quick), markdown_table(self.rows, names)
        source = f"Base: {base.source}. Text features: {texts.source}. Seed {args.seed}."
        data = "Data: " + ("your folder." if args.data else "GENERATED by the example, not photographs.")
        if not args.weights:
            data += " The base was trained on generated data."
        notes = "\n".join(f"* {line}" for line in lines)
        text = f"{data} {source}\n\n{table}\n\nScores are on test images no model trained on.\n\n{notes}\n"
        (args.out / "table.md").write_text(text, encoding="utf-8")
        self.writer.close()
        seconds = round(time.perf_counter() - self.started, 2)
        results = {
            "rows": self.rows, "summary": lines, "swap": {**vars(swap), "exact": swap.exact}, "merge": merges, "plan": plan,
            "plan_merge": merge_plans, "seed": args.seed, "options": vars(args), "versions": versions(),
            "command": typed_command(), "base": base.source, "base_own": base.own, "texts": texts.source,
            "data_generated": args.data is None, "curves": self.curves, "seconds": seconds, "phases": self.phases,
        }  # fmt: skip
        write_json(args.out / "results.json", results)
        print(f"\n{table}\n\n{notes}\n", flush=True)
        files = ", ".join(f"{path.name} {readable_size(path.stat().st_size)}" for path in self.files.values())
        spent = ", ".join(f"{name} {value:.0f} s" for name, value in self.phases.items())
        self.say(f"adapter files: {files}")
        self.say(
            f"time: {seconds:.0f} s ({spent}). Everything is in {args.out}; the same seed ({args.seed}) repeats it."
        )


def execute(args: argparse.Namespace) -> None:
    """Run the demo as the options say."""
    Demo(args).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)


if __name__ == "__main__":
    sys.exit(main())
