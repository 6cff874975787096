"""Train one adapter on a YOLO-World detector, on one process or several.

    python -m examples.yolo_world train --out runs/tile
    python -m examples.yolo_world train --data DIR --categories screw --weights yolov8l-worldv2.pt --spec SPEC --out runs/screw
    python -m examples.yolo_world train --out runs/tile --resume            (go on where it was interrupted)
    torchrun --nproc-per-node 2 -m examples.yolo_world train --weights W --out runs/two

In ``--out``: ``last.safetensors`` and ``best.safetensors`` (adapter files), ``checkpoint.safetensors`` (all that
``--resume`` needs), ``log.json``, ``tensorboard/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import convpeft

from ..data.augment import add_augmentation_options, augmentation_of
from ..data.files import write_atomically
from ..training.checkpoint import CheckpointError, load_checkpoint
from ..training.guard import GuardSettings
from ..training.model import copy_model, use_classes
from ..training.parallel import KINDS, full, shard
from ..training.schedule import WARM_UP
from ..training.scores import Scores, evaluate
from ..training.trainer import CLIP_NORM, Curves, Trainer, TrainSettings, moving_tensors
from .options import TRAINING_OPTIONS, add_options, check_options, command_parser
from .report import plain, table, typed_command, versions
from .session import Data, Session, close_session, load_base, load_data, load_spec, open_session, run_command

CHECKPOINT = "checkpoint.safetensors"
ADAPTER_LR, PRETRAINED_LR = 4e-3, 1e-3
EMA_DECAY = 0.998


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how long, how fast and how carefully to train."""
    add = parser.add_argument_group("training of one adapter").add_argument
    guard = GuardSettings()
    add("--name", help="the adapter's name in its file (default: the categories)")
    add("--epochs", type=float, default=40, help="times each image is seen (default 40)")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--lr", type=float,
        help=f"learning rate of a rule with lr_mult 1 (default {ADAPTER_LR:g}; with --weights {PRETRAINED_LR:g})")  # fmt: skip
    add("--warm-up", type=float, default=WARM_UP, help="share of the steps in which the rate rises (default 0.1)")
    add("--clip-norm", type=float, default=CLIP_NORM, help="largest norm of the gradients; 0 leaves them (default 10)")
    add("--ema", type=float, nargs="?", const=EMA_DECAY, default=0.0, metavar="DECAY",
        help=f"evaluate and save a moving average of what trains (decay {EMA_DECAY} if none is given)")  # fmt: skip
    add("--patience", type=int, default=0,
        help="stop after so many evaluations without a better mAP50-95 (default: never)")  # fmt: skip
    add("--checkpoint-every", type=int, default=100,
        help="steps between checkpoints (default 100, and at each evaluation)")  # fmt: skip
    add("--resume", type=Path, nargs="?", const=Path(), metavar="RUN",
        help="go on from a run's checkpoint: adapter, optimizer, schedule, data position, averages (default: --out's own)")  # fmt: skip
    add("--weights-only", action="store_true",
        help="with --resume RUN: take only the adapter (of a run's folder, or an adapter file) and start its training anew")  # fmt: skip
    add("--workers", type=int, default=0, help="processes that load images ahead (default 0)")
    add("--parallel", choices=KINDS, default="ddp",
        help="with several processes: copies (ddp), or FSDP2 for a large base")  # fmt: skip
    add("--guard-streak", type=int, default=guard.streak,
        help="bad steps in a row before it returns to the last good adapter (default 3)")  # fmt: skip
    add("--guard-lower", type=float, default=guard.lower, help="what a return multiplies the rate by (default 0.3)")
    add("--guard-spike", type=float, default=guard.spike,
        help="a loss so many times the recent median is a bad step too; 0: only what is not finite (default 20)")  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = command_parser(
        "train",
        "Train one adapter on a YOLO-World detector. Also under torchrun or accelerate launch.",
        model=("spec", "aliases"),
        out=Path("runs/train"),
    )
    add_options(parser, "training", TRAINING_OPTIONS)
    add_training_options(parser)
    add_augmentation_options(parser)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    return check(parser, parser.parse_args(arguments))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with what depends on others filled in, or exit with a message if one is out of range."""
    check_options(parser, args)
    for name in ("epochs", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} must be above 0")
    for name in ("weight_decay", "clip_norm", "patience", "workers", "guard_spike"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if not 0 <= args.ema < 1:
        parser.error("--ema must lie between 0 and 1")
    if not 0 < args.guard_lower < 1:
        parser.error("--guard-lower must lie between 0 and 1")
    if not 0 <= args.warm_up < 1:
        parser.error("--warm-up is a share of the steps, at least 0 and below 1")
    if args.weights_only and args.resume in (None, Path()):
        parser.error("--weights-only wants --resume RUN: a run's folder or an adapter file")
    try:
        augmentation_of(args)
    except ValueError as error:
        parser.error(str(error))
    if args.lr is None:
        args.lr = ADAPTER_LR if args.weights is None else PRETRAINED_LR
    return args


def settings_of(args: argparse.Namespace, images: int, processes: int) -> TrainSettings:
    """Return the settings of a run over so many training images in so many processes."""
    per_step = args.batch_size * args.accumulation * processes
    steps = args.steps if args.steps is not None else max(math.ceil(args.epochs * images / per_step), 1)
    return TrainSettings(
        steps, args.batch_size, args.accumulation, args.clip_norm, args.ema, args.evaluations, args.patience,
        args.checkpoint_every, args.warm_up, seed=args.seed, workers=args.workers, parallel=args.parallel,
    )  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """What a training left behind: its curves, the adapter's files, what trained, and what ``log.json`` holds."""

    curves: Curves
    files: dict[str, Path]
    trainable: int
    groups: list[dict[str, Any]]
    log: dict[str, Any]


def frozen_digest(model: nn.Module) -> str:
    """Return a digest of all parameters that do not train: a run is only resumed on the base it began on."""
    state = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            state.update(name.encode())
            state.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """Return the optimizer groups as a Markdown table: multiplier, rate, weight decay, parameters."""
    rows = [
        (group["name"], f"x{group['lr_mult']:g}", f"{group['lr']:g}", f"{group['weight_decay']:g}",
         f"{sum(parameter.numel() for parameter in group['params']):,}")
        for group in groups
    ]  # fmt: skip
    return table(("group", "lr multiplier", "learning rate", "weight decay", "parameters"), rows)


def adapt(model: nn.Module, args: argparse.Namespace, data: Data, spec: convpeft.Spec | None, session: Session) -> str:
    """Put the adapter into the model in place: fresh from the spec, or of a file; return its name."""
    name = args.name or re.sub(r"[^\w+-]", "_", data.title)
    if args.weights_only:
        path = args.resume / "last.safetensors" if args.resume.is_dir() else args.resume
        file = convpeft.load_adapter(model, path, name=name)
        session.say(f"adapter of {path} (saved as '{file.name}'); its training starts anew")
        return name
    torch.manual_seed(args.seed)
    plan = convpeft.inject(model, spec if spec is not None else load_spec(args.spec, args.aliases), name=name)
    session.say(f"adapter '{name}' by {args.spec.name}:\n{plan}")
    return name


def check_called(model: nn.Module, data: Data, session: Session) -> None:
    """Say which adapters a forward pass never calls, if there are any."""
    image = data.test.loaded[0][0] if len(data.test) else data.train.loaded[0][0]
    device = session.accelerator.device
    report = convpeft.check(model, image[None].to(device).float() / 255, txt_feats=data.texts.to(device))
    if not report.ok:
        session.say(f"warning: {report}")


class Keeper:
    """Writes the adapter as the model shows it; for a sharded model through a whole copy in the main process.

    Args:
        model: injected, not yet sharded.
        folder: for the files.
        session: which process writes.
        sharded: whether the model is going to be.
    """

    def __init__(self, model: nn.Module, folder: Path, session: Session, *, sharded: bool) -> None:
        self.model, self.folder, self.session = model, folder, session
        self.whole = copy_model(model).cpu() if sharded and session.is_main else None
        self.sharded = sharded
        self.files: dict[str, Path] = {}

    def __call__(self, which: str) -> None:
        """Write ``<which>.safetensors``; all processes take part."""
        if self.sharded:
            targets = {} if self.whole is None else moving_tensors(self.whole)
            for name, tensor in moving_tensors(self.model).items():
                value = full(tensor.detach())
                if targets:
                    with torch.no_grad():
                        targets[name].copy_(value)
        if self.session.is_main:
            source = self.whole if self.whole is not None else self.model
            self.files[which] = convpeft.save_adapter(source, self.folder / f"{which}.safetensors")


def same_run(found: dict[str, Any], note: dict[str, Any], session: Session, path: Path) -> None:
    """Say what differs between a checkpoint's run and this one.

    Raises:
        CheckpointError: if the difference is one no run can go on over: another spec, base, or classes.
    """
    for key, what in (("spec", "spec"), ("base", "base"), ("classes", "list of classes")):
        if found.get(key) != note[key]:
            raise CheckpointError(
                f"{path} was trained with another {what}; a run goes on with the one it began with. Give the same options, or "
                "take its adapter alone: --resume RUN --weights-only."
            )
    differ = [f"{k} {found.get(k)} -> {v}" for k, v in note.items() if k not in ("spec", "base") and found.get(k) != v]
    if differ:
        session.say(f"resumed with other settings than the run began with: {'; '.join(differ)}")


def learn(
    args: argparse.Namespace, session: Session, data: Data, model: nn.Module, *,
    spec: convpeft.Spec | None = None, on_scores: Callable[[int, Scores], None] | None = None,
) -> Outcome:  # fmt: skip
    """Put an adapter into a base in place, train it, and return what came out; the adapter stays in the model.

    Args:
        args: options as ``parse`` returns them; ``args.out`` takes the files.
        session: device and processes.
        data: what to learn.
        model: the bare base, on the session's device.
        spec: instead of ``args.spec``.
        on_scores: called in the main process at each evaluation with (steps done, scores); what it raises ends the run.
    """
    accelerator = session.accelerator
    sharded = args.parallel == "fsdp" and accelerator.num_processes > 1
    use_classes(model, data.texts)
    name = adapt(model, args, data, spec, session)
    check_called(model, data, session)
    note = {
        "spec": convpeft_spec(model, name), "base": frozen_digest(model), "classes": list(data.classes), "lr": args.lr,
        "images": len(data.train), "weight_decay": args.weight_decay, "precision": args.precision, "seed": args.seed,
        "global_batch": args.batch_size * accelerator.num_processes, "accumulation": args.accumulation,
    }  # fmt: skip
    keep = Keeper(model, args.out, session, sharded=sharded)
    if sharded:
        shard(model)
    groups = convpeft.param_groups(model, lr=args.lr, weight_decay=args.weight_decay)
    settings = settings_of(args, len(data.train), accelerator.num_processes)

    def measure(current: nn.Module) -> Scores | None:
        if not (session.is_main or sharded):
            return None
        scores = evaluate(current, data.test, data.texts, batch_size=args.batch_size)
        if on_scores is not None and session.is_main:
            on_scores(trainer.step, scores)
        return scores

    trainer = Trainer(
        model, groups, data.train, data.texts, settings, accelerator=accelerator,
        guard=GuardSettings(args.guard_streak, args.guard_lower, spike=args.guard_spike), measure=measure, keep=keep,
        extra_loss=convpeft.auxiliary_loss, say=session.say, note=note,
    )  # fmt: skip
    if args.resume is not None and not args.weights_only:
        resume(trainer, args, note, session)
    table = describe_groups(groups)
    session.say(f"{describe_run(settings, accelerator.num_processes, len(data.train))}\n{table}")
    if session.is_main:
        trainer.writer = SummaryWriter(args.out / "tensorboard", purge_step=trainer.step + 1 if trainer.step else None)
        trainer.writer.add_text("groups", table)
    try:
        curves = trainer.run(args.out / CHECKPOINT)
    finally:
        if trainer.writer is not None:
            trainer.writer.close()
    log = run_log(args, data, trainer, groups, note, accelerator.num_processes)
    if session.is_main:
        write_log(args.out / "log.json", log)
    return Outcome(curves, keep.files, sum(p.numel() for p in trainer.parameters), groups, log)


def convpeft_spec(model: nn.Module, name: str) -> dict[str, Any]:
    """Return the spec an adapter of the model came from, as plain data."""
    return json.loads(json.dumps(convpeft.AdaptedModel.of(model).record(name).spec))


def describe_run(settings: TrainSettings, processes: int, images: int) -> str:
    """Return a sentence on how long a run is and how large its batches are."""
    each = settings.batch_size * settings.accumulation * processes
    return (
        f"{settings.steps} steps of {each} images ({settings.batch_size} x {settings.accumulation} accumulated x {processes} "
        f"processes), {settings.steps * each / images:.1f} epochs of {images} images; seed {settings.seed}"
    )


def resume(trainer: Trainer, args: argparse.Namespace, note: dict[str, Any], session: Session) -> None:
    """Bring the trainer to where a checkpoint was written, in place."""
    place = args.out if args.resume == Path() else args.resume
    path = place / CHECKPOINT if place.is_dir() or not place.suffix else place
    same_run(load_checkpoint(path)["note"], note, session, path)
    trainer.resume(path)
    session.say(f"resumed from {path} after step {trainer.step}")


def run_log(
    args: argparse.Namespace, data: Data, trainer: Trainer, groups: Sequence[dict[str, Any]], note: dict[str, Any], processes: int
) -> dict[str, Any]:  # fmt: skip
    """Return what ``log.json`` holds."""
    curves = trainer.curves
    named = [
        {key: value for key, value in group.items() if key in ("name", "lr_mult", "weight_decay")} for group in groups
    ]
    for entry, rate in zip(named, trainer.base_rates, strict=True):
        entry["lr"] = rate
    return {
        "command": typed_command(), "options": vars(args),
        "versions": versions(), "data": data.source, "texts": data.features.source, "classes": data.classes,
        "processes": processes, "settings": trainer.settings, "groups": named, "base": note["base"],
        "steps": trainer.step, "stopped_early": trainer.stopped, "losses": curves.losses, "norms": curves.norms,
        "factors": curves.factors, "scores": [{"step": step, **vars(found)} for step, found in curves.scores],
        "best": {"step": curves.best_step, "map50_95": curves.best}, "seconds": round(curves.seconds, 2),
        "guard": {"skipped": trainer.guard.skipped, "returns": trainer.guard.returns, "rate": trainer.guard.rate,
                  "messages": curves.messages},
    }  # fmt: skip


def finite(value: Any) -> Any:
    """Return plain data with every number that is not finite replaced by None, which JSON has a word for."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_log(path: Path, log: dict[str, Any]) -> None:
    """Write ``log.json``, atomically."""
    text = json.dumps(finite(plain(log)), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def execute(args: argparse.Namespace) -> Outcome:
    """Train as the options say and return what came out."""
    session = open_session(args)
    try:
        with session.accelerator.main_process_first():  # it may have data to generate
            data = load_data(args, session.say)
        base = load_base(args, data.features, session)
        outcome = learn(args, session, data, base.model)
        curves, guard = outcome.curves, outcome.log["guard"]
        session.say(
            f"best mAP50-95 {curves.best:.3f} after step {curves.best_step}; last loss {curves.losses[-1]:.4g}; steps skipped "
            f"{guard['skipped']}, returns to a good adapter {guard['returns']}. Everything is in {args.out}."
        )
        return outcome
    finally:
        close_session(session)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)
