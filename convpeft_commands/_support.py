"""What the commands share: ``--json``, errors as one line with exit code 2, and progress."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
BAD = 2  # exit code: a file or an option cannot be used
NO = 1  # exit code: a check says no


def answering(function: Function) -> Function:
    """Add ``--json`` to a command and turn errors into one line; the command returns its answer and a text of it.

    The function returns ``(answer, text)``, or ``(answer, text, exit code)``.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
    @functools.wraps(function)
    def run(*arguments: Any, as_json: bool, **options: Any) -> None:
        try:
            answer, text, *code = function(*arguments, **options)
        except click.ClickException:
            raise
        except Exception as error:
            if not _is_expected(error):
                raise
            _fail(error, as_json)
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False, default=str) if as_json else text)
        sys.exit(code[0] if code else 0)

    return run  # type: ignore[return-value]


def _is_expected(error: Exception) -> bool:
    """Return whether an error is about what the user gave, and not of this code."""
    from convpeft.errors import ConvPeftError

    return isinstance(error, (ConvPeftError, OSError, CommandError))


class CommandError(Exception):
    """What was given cannot be used; the text says why and what to do."""


def _fail(error: Exception, as_json: bool) -> None:
    line = "; ".join(part.strip() for part in str(error).splitlines() if part.strip())
    if as_json:
        said = {"type": type(error).__name__, "message": str(error)}
        for name in ("layers", "reasons"):
            if getattr(error, name, None):
                said[name] = getattr(error, name)
        click.echo(json.dumps({"error": said}, indent=2, ensure_ascii=False))
    click.echo(f"Error: {line}", err=True)
    sys.exit(BAD)


@contextmanager
def shown_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function of bytes done and bytes to do that draws a bar on the terminal, if the errors go to one."""
    bars: list[Any] = []

    def step(done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if not bars:
            bars.append(click.progressbar(length=total, label=label, file=sys.stderr).__enter__())
        bars[0].update(done - bars[0].pos)

    try:
        yield step
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)


def megabytes(size: float) -> str:
    """Return a number of bytes as a text."""
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.2f} kB"
