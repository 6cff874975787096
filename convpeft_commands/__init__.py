"""The command ``convpeft``: one file for each command, found by its name; torch is imported when a command needs it.

This package stands beside ``convpeft``, because importing that imports torch, and neither ``--help`` nor a shell's
completion should. A new command is a new module here with a ``click`` command or group called ``command``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import click


class Commands(click.Group):
    """The commands are the modules of this package whose names do not begin with ``_``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names, sorted."""
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one command; only its own module is imported."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Return the command that the arguments name; for an unknown one the error has the nearest."""
        if args and self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"no command is called {args[0]!r}.{hint} There are: {', '.join(self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"convpeft {version('convpeft')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def main() -> None:
    """Look at, check, plan, merge and combine adapters of convolutional models.

    Each command has --help with an example, and --json for programs. The exit code is 0, or 1 where a check says no, or 2
    for files and options that cannot be used; then one line says why, and nothing was written.
    """
