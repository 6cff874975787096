"""Search for a good rank or reduction, learning rate and positions of a spec, with Optuna.

    python -m examples.yolo_world tune --spec SPEC --trials 30 --out runs/tune
    python -m examples.yolo_world tune --spec SPEC --positions neck.reduce neck.top_down neck.bottom_up --out runs/tune

The study lives in ``--out`` (``study.db``, SQLite): the same command goes on with it after it was stopped or killed, and
several of them, started at the same time, share its trials. A trial whose process died is taken up from its checkpoint.
``--out`` also gets ``best.yaml`` (a spec for ``train``), ``trials.md``, ``study.json`` and ``trials/<number>/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from torch import nn

import convpeft
from convpeft.adapters.registry import LEAVE, adapter_class

from ..data.files import write_atomically
from ..training.scores import Scores
from ..training.stream import seed_of
from .report import plain, table, versions
from .series import asked_for, needs_one_process, parse_series, same_series, series_parser, train_in
from .session import CommandError, Data, Session, load_base, load_data, load_spec, open_session, run_command
from .train import CHECKPOINT

STUDY = "tune"
MOST_POSITIONS = 6
STARTUP = 8
OWN = ("trials", "heartbeat")


@dataclasses.dataclass(frozen=True)
class Space:
    """What is varied.

    Attributes:
        ranks, reductions: values of the rules that have such an option; empty where none has.
        lr: lowest and highest learning rate.
        positions: named positions of which each trial takes some, at least one; empty to keep the spec's.
    """

    ranks: tuple[int, ...]
    reductions: tuple[int, ...]
    lr: tuple[float, float]
    positions: tuple[str, ...]

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Return one trial's values."""
        values: dict[str, Any] = {"lr": trial.suggest_float("lr", *self.lr, log=True)}
        if self.ranks:
            values["rank"] = trial.suggest_categorical("rank", self.ranks)
        if self.reductions:
            values["reduction"] = trial.suggest_categorical("reduction", self.reductions)
        if self.positions:
            choices = [
                "+".join(some)
                for count in range(len(self.positions), 0, -1)
                for some in itertools.combinations(self.positions, count)
            ]
            values["positions"] = trial.suggest_categorical("positions", choices)
        return values


def patterns_of(rule: dict[str, Any]) -> list[str]:
    """Return a rule's patterns as a list."""
    return [rule["match"]] if isinstance(rule["match"], str) else list(rule["match"])


def width_option(rule: dict[str, Any]) -> str | None:
    """Return which option sets the width of a rule's adapters: ``rank``, ``reduction``, or None.

    A kind that has both goes by its reduction, unless the rule gives it a rank.
    """
    if rule["kind"] == LEAVE:
        return None
    options = {field.name for field in dataclasses.fields(adapter_class(rule["kind"]).Options)}
    if "reduction" in options and rule.get("rank") is None:
        return "reduction"
    return "rank" if "rank" in options else None


def make_space(args: argparse.Namespace, spec: convpeft.Spec) -> Space:
    """Return what the options ask to vary of a spec.

    Raises:
        CommandError: if nothing of a spec can be varied, or a position is none of its rules'.
    """
    rules = spec.to_dict()["rules"]
    named = list(
        dict.fromkeys(pattern[1:] for rule in rules for pattern in patterns_of(rule) if pattern.startswith("@"))
    )
    positions = tuple(named if args.positions == [] else args.positions or ())
    unknown = [name for name in positions if name not in named]
    if unknown:
        raise CommandError(
            f"--positions: no rule of {args.spec.name} is at '{unknown[0]}'. Its rules name {', '.join(named) or 'none'}."
        )
    if len(positions) > MOST_POSITIONS:
        raise CommandError(
            f"{len(positions)} positions have {2 ** len(positions) - 1} combinations; name at most {MOST_POSITIONS} with "
            "--positions, the others stay."
        )
    return Space(
        tuple(args.ranks) if "rank" in map(width_option, rules) else (),
        tuple(args.reductions) if "reduction" in map(width_option, rules) else (),
        (args.lr_range[0], args.lr_range[1]), positions,
    )  # fmt: skip


def vary(spec: convpeft.Spec, values: dict[str, Any], positions: Sequence[str]) -> convpeft.Spec:
    """Return the spec with a trial's values: rank or reduction in each rule that goes by it, and the positions it takes.

    Args:
        spec: to start from.
        values: of ``Space.suggest``.
        positions: the named positions that are chosen from; a rule that loses all its patterns goes.
    """
    data = spec.to_dict()
    dropped = {"@" + name for name in positions} - {"@" + name for name in values.get("positions", "").split("+")}
    rules = []
    for rule in data["rules"]:
        kept = [pattern for pattern in patterns_of(rule) if pattern not in dropped]
        if not any(not pattern.startswith("!") for pattern in kept):
            continue
        option = width_option(rule)
        own = {option: values[option]} if option in values else {}
        rules.append({**rule, "match": kept, **own})
    return convpeft.Spec.from_dict({**data, "rules": rules})


def open_study(args: argparse.Namespace) -> Any:
    """Return the Optuna study in ``--out``, made if it is not there.

    Raises:
        CommandError: if Optuna is missing.
    """
    try:
        import optuna
    except ImportError as error:
        raise CommandError("tune needs optuna: pip install 'convpeft[commands]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the heartbeat is said to be experimental
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{(args.out / 'study.db').resolve()}",
            engine_kwargs={"connect_args": {"timeout": 120}},
            heartbeat_interval=args.heartbeat,
            grace_period=3 * args.heartbeat,
            **{stale_callback(optuna): retry()},
        )
    pruner = optuna.pruners.NopPruner()
    if args.pruner == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
    return optuna.create_study(
        storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True, pruner=pruner
    )


def stale_callback(optuna: Any) -> str:
    """Return what this Optuna calls the argument for what to do with the trial of a process that died."""
    return (
        "heartbeat_stale_trial_callback"
        if hasattr(optuna.storages, "RetryHeartbeatStaleTrialCallback")
        else "failed_trial_callback"
    )


def retry() -> Any:
    """Return Optuna's callback that queues a trial again, with the same values."""
    import optuna

    new = getattr(optuna.storages, "RetryHeartbeatStaleTrialCallback", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said to be experimental, since 2021
        return (new or optuna.storages.RetryFailedTrialCallback)()


def first_number(study: Any, number: int) -> int:
    """Return the number of the trial that this one repeats, or its own: it names the folder that holds its checkpoint."""
    trial = next(each for each in study.get_trials(deepcopy=False) if each.number == number)
    first = type(retry()).retried_trial_number(trial)
    return number if first is None else first


class Tuner:
    """One process's part of a study.

    Args:
        args: options of the command.
        session, data, base: what trials train with; the base stays as it is.
        spec: to vary.
        study: shared with other processes.
    """

    def __init__(self, args: argparse.Namespace, session: Session, data: Data, base: nn.Module, spec: convpeft.Spec, study: Any) -> None:  # fmt: skip
        self.args, self.session, self.data, self.base, self.spec, self.study = args, session, data, base, spec, study
        self.space = make_space(args, spec)
        self.lock = FileLock(args.out / "study.lock")
        self.current = -1

    def run(self) -> None:
        """Take trials of the study until it has ``--trials`` of them, whoever ran them."""
        import optuna

        waiting = False
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optuna.storages.fail_stale_trials(self.study)
            self.lock.acquire()
            try:
                done, running = self.count()
                if done + running < self.args.trials:
                    waiting = False
                    self.take_one()  # its first act is to give the lock back
                    continue
            finally:
                self.lock.release()
            if not running:
                return
            if not waiting:
                self.session.say(
                    f"waiting for {running} trials of other processes (one that died is noticed after {3 * self.args.heartbeat} s)"
                )
            waiting = True
            time.sleep(min(1.0, self.args.heartbeat))

    def count(self) -> tuple[int, int]:
        """Return how many trials of the study are done (finished or given up early), and how many run now."""
        states = [trial.state.name for trial in self.study.get_trials(deepcopy=False)]
        return sum(state in ("COMPLETE", "PRUNED") for state in states), states.count("RUNNING")

    def take_one(self) -> None:
        """Run one trial; if it is interrupted, queue it again."""
        import optuna

        number = len(self.study.get_trials(deepcopy=False))
        seed = seed_of("tune", self.args.seed, number)
        self.study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=STARTUP, constant_liar=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.study.optimize(self.objective, n_trials=1)
        except KeyboardInterrupt:
            for trial in self.study.get_trials(deepcopy=True):
                if trial.number == self.current:
                    retry()(self.study, trial)
            raise

    def objective(self, trial: Any) -> float:
        """Return a trial's mAP50-95 at its end."""
        import optuna

        self.current = trial.number
        values = self.space.suggest(trial)
        self.lock.release()
        folder = self.args.out / "trials" / f"{first_number(self.study, trial.number):04d}"
        trial.set_user_attr("folder", folder.name)
        said = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        self.session.say(
            f"trial {trial.number}: {said}{' (taken up again)' if (folder / CHECKPOINT).is_file() else ''}"
        )

        def on_scores(step: int, scores: Scores) -> None:
            trial.report(scores.map50_95, step)
            if self.args.pruner != "none" and trial.should_prune():
                raise optuna.TrialPruned(f"below the median of the trials before, at step {step}")

        try:
            varied = vary(self.spec, values, self.space.positions)
            _, outcome = train_in(
                folder, self.args, self.session, self.data, self.base, varied, title=f"trial_{folder.name}",
                lr=values["lr"], on_scores=on_scores,
            )  # fmt: skip
        except (convpeft.SpecError, FloatingPointError) as error:
            trial.set_user_attr("why", str(error))
            self.session.say(f"trial {trial.number} given up: {error}")
            raise optuna.TrialPruned(str(error)) from error
        scores = outcome.curves.scores[-1][1]
        trial.set_user_attr("map50", scores.map50)
        trial.set_user_attr("trainable", outcome.trainable)
        varied.save(folder / "spec.yaml")
        (folder / CHECKPOINT).unlink(missing_ok=True)
        self.session.say(f"trial {trial.number}: mAP50-95 {scores.map50_95:.3f}, mAP50 {scores.map50:.3f}")
        return scores.map50_95


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = series_parser(
        "tune", "Search for rank or reduction, learning rate and positions with Optuna. It takes train's options too.",
        out=Path("runs/tune"), without=("lr",),
    )  # fmt: skip
    add = parser.add_argument_group("search").add_argument
    add("--trials", type=int, default=20, help="trials of the study in all, whoever runs them (default 20)")
    add("--ranks", type=int, nargs="+", default=(4, 8, 16, 32), help="ranks to try, in every rule that has one (default 4 8 16 32)")  # fmt: skip
    add("--reductions", type=int, nargs="+", default=(2, 4, 8, 16), help="reductions to try, alike (default 2 4 8 16)")
    add("--lr-range", type=float, nargs=2, default=(1e-4, 1e-2), metavar=("LOW", "HIGH"), help="learning rates (default 1e-4 1e-2)")  # fmt: skip
    add("--positions", nargs="*", metavar="NAME",
        help="named positions of the spec's rules to take or leave; without names, all it has (default: keep them)")  # fmt: skip
    add("--pruner", choices=("median", "none"), default="median", help="stop a trial that is below the median so far (default median)")  # fmt: skip
    add("--heartbeat", type=int, default=20,
        help="seconds between signs of life; a process silent for three times that is taken as dead (default 20)")  # fmt: skip
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; exits with a message if one is out of range."""
    parser = make_parser()
    args = parse_series(parser, arguments)
    low, high = args.lr_range
    problems = {
        "--trials must be at least 1": args.trials < 1,
        "--heartbeat must be at least 1": args.heartbeat < 1,
        "--ranks must be above 0": min(args.ranks) < 1,
        "--reductions must be above 0": min(args.reductions) < 1,
        "--lr-range wants two rates above 0, the lower first": not 0 < low <= high < math.inf,
    }
    for problem, found in problems.items():
        if found:
            parser.error(problem)
    return args


def write_results(args: argparse.Namespace, study: Any, spec: convpeft.Spec, space: Space) -> dict[str, Any]:
    """Write ``study.json``, ``trials.md`` and ``best.yaml`` from the whole study, and return what the first holds."""
    trials = [
        trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and trial.state.name != "FAIL"
    ]
    rows = [
        {"number": trial.number, "state": trial.state.name.lower(), "map50_95": trial.value, **trial.params, **trial.user_attrs}
        for trial in trials
    ]  # fmt: skip
    complete = [row for row in rows if row["state"] == "complete"]
    best = max(complete, key=lambda row: row["map50_95"], default=None)
    parameters = dict.fromkeys(key for trial in trials for key in trial.params)
    columns = ["number", "state", "map50_95", "map50", "trainable", *parameters]
    ranked = sorted(rows, key=lambda row: (row["state"] != "complete", -(row["map50_95"] or 0), row["number"]))
    cells = [[row.get(column) for column in columns] for row in ranked]
    lines = [["–" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in line] for line in cells]
    results = {"best": best, "trials": rows, "options": vars(args), "versions": versions()}
    write_atomically(args.out / "trials.md", (table(columns, lines) + "\n").encode())
    write_atomically(args.out / "study.json", (json.dumps(plain(results), indent=1) + "\n").encode())
    if best is not None:
        varied = vary(spec, best, space.positions)
        head = f"# Trial {best['number']} of {args.spec.name}: mAP50-95 {best['map50_95']:.4f} with --lr {best['lr']:.4g}\n"
        text = head + yaml.safe_dump(varied.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomically(args.out / "best.yaml", text.encode())
    return results


def execute(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what ``study.json`` holds."""
    session = open_session(args)
    needs_one_process(session, "tune")
    spec = load_spec(args.spec, args.aliases)
    space = make_space(args, spec)
    asked = {**asked_for(args, free=OWN), "spec": spec.to_dict(), "positions": list(space.positions)}
    with FileLock(args.out / "study.lock"):
        same_series(args.out / "options.json", json.loads(json.dumps(asked)))
        study = open_study(args)
    data = load_data(args, session.say)
    base = load_base(args, data.features, session).model
    tuner = Tuner(args, session, data, base, spec, study)
    done, running = tuner.count()
    session.say(f"study in {args.out}: {done} of {args.trials} trials done, {running} said to be running")
    tuner.run()
    with FileLock(args.out / "study.lock"):
        results = write_results(args, study, spec, space)
    best = results["best"]
    if best is None:
        raise CommandError(
            f"none of the {len(results['trials'])} trials came to its end; see {args.out / 'trials.md'}."
        )
    session.say(
        f"best of {len(results['trials'])} trials: number {best['number']}, mAP50-95 {best['map50_95']:.3f}. Its spec is "
        f"{args.out / 'best.yaml'}, to be trained with --lr {best['lr']:.4g}; its adapter is in trials/{best['folder']}."
    )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run_command(parse(arguments), execute)
