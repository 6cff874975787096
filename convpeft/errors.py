"""Every error convpeft raises; each also inherits the builtin a caller would catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConvPeftError(Exception):
    """The base class of every error this library raises."""


class SpecError(ConvPeftError, ValueError):
    """A spec asks for something that cannot be done; the text lists all its problems at once."""


class PatternError(SpecError):
    """A pattern matches nothing, nothing its kind can serve, or nothing that earlier rules left."""


class OptionError(SpecError):
    """An option of a rule is unknown, of the wrong type or out of range."""


class UnknownKind(SpecError, LookupError):
    """A rule names an adapter kind that is not registered."""


class RegistrationError(ConvPeftError, ValueError):
    """``register_adapter`` was given a name that is taken or a class that is not an adapter."""


class ShapeMismatch(ConvPeftError, ValueError):
    """Two tensors that should fit each other do not."""


class GeometryError(ConvPeftError, ValueError):
    """A layer is not a convolution that convpeft can describe, or two convolutions do not compose."""


class HostError(ConvPeftError, TypeError):
    """A module cannot host an adapter, or an operation on it would lose its adapter."""


class StateError(ConvPeftError, RuntimeError):
    """The model is not in the state the call needs (nothing injected, a name in use, a layer missing)."""


class UnknownAdapter(StateError, LookupError):
    """The model has no adapter of that name."""


class AdapterConflict(StateError):
    """Two adapters that replace the same tensors cannot be active together."""


class MergeError(ConvPeftError, RuntimeError):
    """A layer cannot be merged; ``reasons`` maps each such layer to the reason."""

    def __init__(self, message: str, reasons: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class NotMergeable(MergeError):
    """An adapter has no equivalent convolution (it is not linear, or depends on its input)."""


class AdapterFileError(ConvPeftError, ValueError):
    """A file is not a valid adapter file, or does not fit this model."""


class BaseMismatch(AdapterFileError):
    """An adapter file was made on another base model; ``layers`` names those that differ."""

    def __init__(self, message: str, layers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


def closest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return the candidates most like ``name``, joined by commas, or an empty string when none is close."""
    near = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.4)
    return ", ".join(near)


def shortened(names: Sequence[str], limit: int = 8) -> str:
    """Return names joined by commas; those after the first ``limit`` are replaced by their count."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} (+{len(names) - limit} more)"


def raise_problems(problems: Sequence[SpecError], heading: str) -> None:
    """Raise one error that lists all ``problems``: of their common class, or ``SpecError`` when the classes differ."""
    if not problems:
        return
    classes = {type(problem) for problem in problems}
    error = classes.pop() if len(classes) == 1 else SpecError
    if len(problems) == 1:
        raise error(f"{heading}: {problems[0]}")
    lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
    raise error(f"{heading}: {len(problems)} problems, nothing was changed.\n{lines}")
