"""What commands that train many times share: their options on top of train's, and one training in a folder of its own."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import convpeft

from ..data.files import write_atomically
from ..training.model import copy_model
from ..training.scores import Scores
from . import train
from .report import plain
from .session import CommandError, Data, Session

OF_TRAIN_ALONE = ("name", "resume", "weights_only", "parallel")
"""Options of train that mean nothing where many trainings run."""

FREE = ("out", "cache", "device", "threads", "workers", "checkpoint_every", *OF_TRAIN_ALONE)
"""Options that may differ from one run to the next without changing what is found."""


def series_parser(name: str, description: str, *, out: Path, without: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of a command that takes train's options, to which it adds its own.

    Args:
        name: the command's.
        description: of the command.
        out: default of ``--out``.
        without: further options of train that it does not take, by name.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.yolo_world {name}", description=description, parents=[train.make_parser()],
        conflict_handler="resolve", allow_abbrev=False,
    )  # fmt: skip
    hidden = (*OF_TRAIN_ALONE, *without)
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    parser.set_defaults(out=out, of_train_alone=hidden)
    return parser


def parse_series(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line, those of train checked; exits with a message if one is wrong."""
    args = parser.parse_args(arguments)
    hidden = args.of_train_alone
    del args.of_train_alone
    refused = [name for name in hidden if getattr(args, name) != parser.get_default(name)]
    if refused:
        parser.error(f"--{refused[0].replace('_', '-')} belongs to train; this command sets it for each training")
    return train.check(parser, args)


def needs_one_process(session: Session, what: str) -> None:
    """Raise a CommandError if the command was started by torchrun or accelerate launch."""
    if session.accelerator.num_processes > 1:
        raise CommandError(f"{what} runs in one process; {session.accelerator.num_processes} were launched together.")


def asked_for(args: argparse.Namespace, *, free: Iterable[str] = ()) -> dict[str, Any]:
    """Return the options that decide what is found, as plain data; ``free`` names further ones that do not."""
    left_out = {*FREE, *free}
    return json.loads(json.dumps(plain({key: value for key, value in vars(args).items() if key not in left_out})))


def same_series(path: Path, asked: dict[str, Any]) -> None:
    """Keep the options beside the first results, and refuse to add results of other options to them.

    Raises:
        CommandError: naming the options that differ.
    """
    if not path.is_file():
        write_atomically(path, (json.dumps(asked, indent=1) + "\n").encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differ = [
        f"--{key.replace('_', '-')} {before.get(key)} then, {asked.get(key)} now"
        for key in sorted({*before, *asked})
        if before.get(key) != asked.get(key)
    ]
    if differ:
        raise CommandError(
            f"{path.parent} holds results of other options: {'; '.join(differ)}. Give the same ones to go on, or another --out."
        )


def note_lines(path: Path) -> Callable[[str], None]:
    """Return a function that adds lines to a file, for what one of many trainings has to say."""

    def say(text: str) -> None:
        """Add a line."""
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    return say


def train_in(
    folder: Path, args: argparse.Namespace, session: Session, data: Data, base: nn.Module, spec: convpeft.Spec, *,
    title: str, lr: float | None = None, on_scores: Callable[[int, Scores], None] | None = None,
) -> tuple[nn.Module, train.Outcome]:  # fmt: skip
    """Train an adapter on a copy of the base in a folder, going on where an earlier try was cut off; return model and outcome.

    What the training says goes to ``log.txt`` in the folder.

    Args:
        folder: for its files.
        args: options of the whole series.
        session: device; its folder is not used.
        data: what to learn.
        base: the bare base, which stays as it is.
        spec: of the adapter.
        title: name of the adapter.
        lr: instead of ``--lr``.
        on_scores: see ``train.learn``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = argparse.Namespace(**vars(args))
    own.out, own.name, own.spec = folder, title, Path(title)
    own.lr = args.lr if lr is None else lr
    own.resume = Path() if (folder / train.CHECKPOINT).is_file() else None
    quiet = Session(session.accelerator, folder, note_lines(folder / "log.txt"))
    model = copy_model(base)
    return model, train.learn(own, quiet, data, model, spec=copy.deepcopy(spec), on_scores=on_scores)
