"""Models from a text on the command line, without weights and without a network."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from ._support import CommandError

if TYPE_CHECKING:
    from torch import nn

HELP = (
    "pkg.module:factory (called without arguments, or with --set), ultralytics:CONFIG.yaml, torchvision:NAME or timm:NAME; "
    "built without weights."
)
option = click.option("--model", "model_name", required=True, metavar="MODEL", help=HELP)
settings = click.option(
    "--set",
    "given",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the factory, e.g. num_classes=5; again for more.",
)


def build(name: str, given: tuple[str, ...]) -> nn.Module:
    """Return the model of a text, in eval mode.

    Args:
        name: see ``HELP``.
        given: arguments as ``NAME=VALUE``; a value is a Python literal, or else a text.

    Raises:
        CommandError: if there is none, or its factory fails.
    """
    from torch import nn

    source, colon, rest = name.partition(":")
    if not colon or not rest:
        raise CommandError(f"--model {name} is none of: {HELP}")
    arguments = dict(map(_argument, given))
    maker = {"ultralytics": _ultralytics, "torchvision": _torchvision, "timm": _timm}.get(source)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what others print is no part of the answer
            made = maker(rest, arguments) if maker else _factory(source, rest)(**arguments)
    except CommandError:
        raise
    except Exception as error:  # of somebody else's code, whatever it is
        raise CommandError(f"--model {name}: {type(error).__name__}: {str(error) or 'no reason given'}") from error
    if not isinstance(made, nn.Module):
        raise CommandError(f"--model {name} gave a {type(made).__name__}, and no torch.nn.Module")
    return made.eval()


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise CommandError(f"--set {text} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _factory(module: str, path: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    finally:
        sys.path.remove(os.getcwd())
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _ultralytics(config: str, arguments: dict[str, Any]) -> nn.Module:
    from convpeft.integrations.ultralytics import from_config

    return from_config(config, **arguments)


def _torchvision(name: str, arguments: dict[str, Any]) -> Any:
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    known = inspect.signature(builder).parameters
    bare = {key: None for key in ("weights", "weights_backbone") if key in known}
    return builder(**{**bare, **arguments})


def _timm(name: str, arguments: dict[str, Any]) -> Any:
    import timm

    return timm.create_model(name, **{"pretrained": False, **arguments})
