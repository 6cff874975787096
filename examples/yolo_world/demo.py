"""Two adapters on one frozen YOLO-World, against full fine-tuning; then swapped and merged.

    python -m examples.yolo_world.demo
    python -m examples.yolo_world.demo --data DIR --weights yolov8s-worldv2.pt --categories screw bottle

``settings.py`` holds the options, ``README.md`` beside it explains them.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import convpeft

from .commands.pictures import save_comparison, save_curves
from .commands.proofs import MergeProof, SwapProof, Task, predict_all, show_merge, show_swap
from .commands.report import Row, markdown_table, readable_size, summarise, versions, write_json
from .commands.settings import Options, parse
from .data.generate import DEFECTS
from .data.mvtec import DataError, DefectImages, list_categories, read_category
from .data.texts import TextError, TextFeatures, load_texts
from .training.base import Base, generated_data, get_base
from .training.engine import History, Settings, all_parameter_groups, make_accelerator, train
from .training.model import WeightsError, copy_model, count_parameters, prepare_ultralytics, unfreeze_all
from .training.scores import Scores, evaluate, predict, score


class Demo:
    """One run: what it was asked, what all its steps share, and what they found."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.rows: list[Row] = []
        self.histories: dict[str, History] = {}
        self.files: dict[str, Path] = {}
        options.out.mkdir(parents=True, exist_ok=True)
        self.accelerator: Accelerator = make_accelerator(options.device, options.precision, options.accumulation)
        self.writer = SummaryWriter(options.out / "tensorboard")

    def say(self, text: str) -> None:
        """Print a line with the minutes and seconds since the start."""
        spent = int(time.perf_counter() - self.started)
        print(f"[{spent // 60:02d}:{spent % 60:02d}] {text}", flush=True)

    def close_phase(self, name: str) -> None:
        """Note the time since the last phase ended as this phase's."""
        self.phases[name] = round(time.perf_counter() - self.started - sum(self.phases.values()), 2)

    def settings(self) -> Settings:
        """Return how adapters and full fine-tuning are trained: the same for both."""
        options = self.options
        return Settings(options.steps, options.batch_size, options.accumulation, options.evaluations, options.seed)

    def read_data(self) -> tuple[list[Task], TextFeatures]:
        """Return the two categories with their images and text features."""
        options = self.options
        root = options.data if options.data is not None else generated_data(options)
        names = options.categories or tuple(list_categories(root)[:2])
        if len(names) < 2:
            raise DataError(f"{root} has one category only; the demo compares two (--categories A B).")
        found = [read_category(root, name, train_share=options.train_share, seed=options.seed) for name in names]
        texts = load_texts([*DEFECTS, *(label for category in found for label in category.classes)], options.texts)
        kind = "your folder" if options.data else "GENERATED, not photographs"
        self.say(f"data ({kind}): {root}; text features {texts.source}")
        tasks = []
        for category in found:
            size, area = options.image_size, options.min_area
            sides = [
                DefectImages(samples, category.classes, size=size, min_area=area, augmented=augmented)
                for samples, augmented in ((category.train, True), (category.test, False))
            ]
            left_out = sum(len(side.left_out) for side in sides)
            self.say(
                f"  {category.name}: {len(sides[0])} images train, {len(sides[1])} others test, classes {', '.join(category.classes)}"
                + (f"; {left_out} left out, every part of their mask is below {area} pixels" if left_out else "")
            )
            tasks.append(Task(category.name, sides[0], sides[1], texts.of(category.classes)))
        return tasks, texts

    def scores(self, model: nn.Module, tasks: Sequence[Task]) -> dict[str, Scores]:
        """Return the model's scores on the test images of each task."""
        return {task.name: evaluate(model, task.test, task.texts, batch_size=self.options.batch_size) for task in tasks}

    def learn(self, model: nn.Module, groups: list[dict[str, Any]], task: Task, title: str, adapter: bool) -> History:
        """Train on one task with the shared settings, taking scores on the way."""

        def measure(current: nn.Module) -> Scores:
            return evaluate(current, task.test, task.texts, batch_size=self.options.batch_size)

        extra = convpeft.auxiliary_loss if adapter else None
        history = train(
            model, groups, task.train, task.texts, self.settings(), self.accelerator,
            title=title, writer=self.writer, measure=measure, extra_loss=extra,
        )  # fmt: skip
        self.histories[title] = history
        return history

    def train_adapter(self, model: nn.Module, spec: convpeft.Spec, task: Task, tasks: Sequence[Task]) -> None:
        """Inject one more adapter into the shared frozen base, train it, save it, and add its row."""
        options = self.options
        convpeft.set_active(model, None) if self.files else None
        torch.manual_seed(options.seed)
        convpeft.inject(model, spec, name=task.name)
        convpeft.set_active(model, task.name)
        groups = convpeft.param_groups(model, lr=options.adapter_lr, weight_decay=options.weight_decay)
        history = self.learn(model, groups, task, f"adapter {task.name}", adapter=True)
        state = convpeft.summary(model)
        path = convpeft.save_adapter(model, options.out / "adapters" / f"{task.name}.safetensors", name=task.name)
        self.files[task.name] = Path(path)
        self.rows.append(
            Row(
                "adapter",
                task.name,
                self.scores(model, tasks),
                state.trainable_parameters,
                state.trainable_parameters / state.base_parameters,
                history.seconds_per_step,
                path.stat().st_size,
            )
        )

    def train_full(self, base: nn.Module, task: Task, tasks: Sequence[Task]) -> None:
        """Fine-tune a copy of the base with every parameter, for the same number of steps, and add its row."""
        model = unfreeze_all(copy_model(base))
        groups = all_parameter_groups(model, lr=self.options.full_lr, weight_decay=self.options.weight_decay)
        trainable, total = count_parameters(model)
        history = self.learn(model, groups, task, f"full {task.name}", adapter=False)
        scores = self.scores(model, tasks)
        self.rows.append(
            Row(
                "full fine-tuning",
                task.name,
                scores,
                trainable,
                trainable / total,
                history.seconds_per_step,
                state_bytes(model),
            )
        )

    def run(self) -> None:
        """Run the whole demo and write its output folder."""
        options = self.options
        self.say(f"seed {options.seed}, device {self.accelerator.device}, {torch.get_num_threads()} CPU threads")
        tasks, texts = self.read_data()
        self.close_phase("data")
        base = get_base(options, texts, self.accelerator, self.writer, self.say)
        bare = unfreeze_all(base.model)
        self.close_phase("base")
        self.say(f"base: {base.source}")
        if base.own is not None:
            self.say(
                f"  on test images of its own categories: mAP50 {base.own.map50:.3f}, mAP50-95 {base.own.map50_95:.3f}"
            )
        self.rows.append(Row("base", None, self.scores(bare, tasks), 0, 0.0, None, state_bytes(bare)))
        boxes: dict[str | None, list[Tensor]] = {None: predict_all(bare, tasks)}

        spec = convpeft.Spec.load(options.spec)
        plan = str(convpeft.plan(bare, spec))
        self.say(f"adapter specification {options.spec.name}, before anything is touched:\n{plan}")
        adapted = copy_model(bare)
        for task in tasks:
            self.train_adapter(adapted, spec, task, tasks)
            boxes[task.name] = predict_all(adapted, tasks)
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
        self.finish(base, texts, swap, merges, plan, merge_plans, [task.name for task in tasks])

    def merge_all(self, adapted: nn.Module, tasks: Sequence[Task]) -> tuple[dict[str, MergeProof], dict[str, str]]:
        """Merge each adapter into plain layers and compare; return the proofs and the merge plans."""
        proofs, plans = {}, {}
        for task in tasks:
            convpeft.set_active(adapted, task.name)
            plans[task.name] = str(convpeft.plan_merge(adapted))
            if len(plans) == 1:
                self.say(f"merge plan:\n{plans[task.name]}")
            merged, proof = show_merge(adapted, task)
            proofs[task.name] = proof
            merged_scores = score(predict(merged, task.test, task.texts), task.test)
            self.say(
                f"merge of {task.name}: plain layers only: {'yes' if proof.plain else 'NO'}; same boxes (confidence above 0.25): "
                f"{'yes' if proof.same_boxes else 'NO'}; largest difference {proof.largest_box_difference:.1e} there, before "
                f"suppression {proof.pixels:.1e} pixels and {proof.scores:.1e} in the scores, {proof.float64:.1e} relative in "
                f"float64; mAP50 {merged_scores.map50:.3f} merged"
            )
        return proofs, plans

    def draw(self, tasks: Sequence[Task], boxes: dict[str | None, list[Tensor]]) -> None:
        """Write the pictures: boxes side by side for each task, and the curves."""
        start = 0
        for task in tasks:
            own = slice(start, start + len(task.test))
            columns = {"base": boxes[None][own], f"adapter: {task.name}": boxes[task.name][own]}
            save_comparison(self.options.out / f"boxes_{task.name}.png", task.test, columns)
            start = own.stop
        base_scores = self.rows[0].scores
        starts = {title: base_scores[title.split(" ", 1)[1]].map50 for title in self.histories}
        save_curves(self.options.out / "curves.png", self.histories, starts=starts)

    def finish(
        self, base: Base, texts: TextFeatures, swap: SwapProof, merges: dict[str, MergeProof],
        plan: str, merge_plans: dict[str, str], names: Sequence[str],
    ) -> None:  # fmt: skip
        """Write table and JSON, and print what came out."""
        options = self.options
        lines, table = summarise(self.rows, names, quick=options.quick), markdown_table(self.rows, names)
        source = f"Base: {base.source}. Text features: {texts.source}. Seed {options.seed}."
        data = "Data: " + ("your folder." if options.data else "GENERATED by the example, not photographs.")
        if not options.weights:
            data += " The base was trained on generated data."
        notes = "\n".join(f"* {line}" for line in lines)
        text = f"{data} {source}\n\n{table}\n\nScores are on test images no model trained on.\n\n{notes}\n"
        (options.out / "table.md").write_text(text, encoding="utf-8")
        self.writer.close()
        seconds = round(time.perf_counter() - self.started, 2)
        results = {
            "rows": self.rows, "summary": lines, "swap": {**vars(swap), "exact": swap.exact}, "merge": merges, "plan": plan,
            "plan_merge": merge_plans, "seed": options.seed, "options": options, "versions": versions(),
            "command": shlex.join(["python", "-m", "examples.yolo_world.demo", *sys.argv[1:]]), "base": base.source,
            "base_own": base.own, "texts": texts.source, "data_generated": options.data is None,
            "histories": self.histories, "seconds": seconds, "phases": self.phases,
        }  # fmt: skip
        write_json(options.out / "results.json", results)
        print(f"\n{table}\n\n{notes}\n", flush=True)
        files = ", ".join(f"{path.name} {readable_size(path.stat().st_size)}" for path in self.files.values())
        spent = ", ".join(f"{name} {value:.0f} s" for name, value in self.phases.items())
        self.say(f"adapter files: {files}")
        self.say(
            f"time: {seconds:.0f} s ({spent}). Everything is in {options.out}; the same seed ({options.seed}) repeats it."
        )


def state_bytes(model: nn.Module) -> int:
    """Return the size of a safetensors file with the model's whole state."""
    from safetensors.torch import save

    return len(save({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from the command line and return the exit status."""
    options = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare_ultralytics()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        Demo(options).run()
    except (DataError, TextError, WeightsError, convpeft.ConvPeftError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
