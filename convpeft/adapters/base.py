"""What every adapter kind says of itself; one file per family beside this one implements it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import NotMergeable, OptionError, closest
from ..geometry import ConvGeometry
from ..kernels import Chain, ConvKernel
from ..low_rank import Factors

Place = Literal["parallel", "output"]


@dataclass(frozen=True)
class Site:
    """Where an adapter sits.

    Attributes:
        place: ``parallel`` (sees the layer's input) or ``output`` (sees the module's output).
        geometry: of the host layer when parallel; 1x1 on the output's channels otherwise.
    """

    place: Place
    geometry: ConvGeometry


@dataclass(frozen=True)
class AdapterOptions:
    """The options of a kind: a frozen dataclass; the annotations are checked, ``problems`` checks the rest."""

    def problems(self) -> Iterator[str]:
        """Yield one sentence for each value that is out of range."""
        return iter(())


class Adapter(nn.Module):
    """A small trainable module that adds ``f`` to its host: ``y = host(x) + f(x)`` or ``y = z + f(z)``.

    A subclass names its ``places``, its ``hosts`` (the layers it can sit beside) and its ``Options``, starts as the
    identity (``f`` is exactly zero when fresh), and either returns its equivalent plain convolutions from ``chain`` or gives the reason why none exist in
    ``merge_refusal``. Geometry is never retyped: ``self.site.geometry`` carries all of it.

    A parallel kind whose update depends on the layer's own weight (DoRA, say) sets ``reads_host``, on the class or on
    the object. It is then called as ``adapter(x, host)`` with a ``hosting.Host``, and gives its kernels from ``chain_beside``
    instead of ``chain``. Nothing of the layer is stored in the adapter, so copies, files and the user's own
    ``load_state_dict`` need no care. A layer whose weight is computed, or whose forward is not the convolution of its
    weight, is refused at plan time for such a kind.

    A kind with more than one way to compute its update sets ``form`` to the name of the chosen one, for the plan.

    Args:
        site: where the adapter sits.
        options: an instance of ``Options``, already checked.
    """

    kind: ClassVar[str] = ""
    places: ClassVar[tuple[Place, ...]] = ()
    hosts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    Options: ClassVar[type[AdapterOptions]] = AdapterOptions
    merge_refusal: ClassVar[str | None] = None
    reads_host: bool = False
    form: str | None = None

    def __init__(self, site: Site, options: AdapterOptions) -> None:
        super().__init__()
        self.site = site
        self.options: Any = options
        self.is_folded = False

    @classmethod
    def refuses(cls, site: Site, options: Any) -> str | None:
        """Return why this kind cannot serve ``site``, as a sentence for the user, or None when it can."""
        return None

    def chain(self) -> Chain:
        """Return the equivalent plain convolutions, run in turn, as float64 kernels.

        ``kernels.compose`` makes the single kernel of them, so a kind writes its algebra once.

        Raises:
            NotMergeable: if none exist; the text says why.
        """
        raise NotMergeable(self.merge_refusal or f"kind {self.kind!r} gives no equivalent convolution")

    def foldable(self) -> str | None:
        """Say what of an adapter that does not merge ``folded`` would fold, for the merge's report; None: nothing."""
        return None

    def folded(self) -> Adapter:
        """Return a float64 copy that computes the same with its linear parts folded, ``is_folded`` set on it.

        Asked for by ``merge(strict=False)`` where ``foldable`` says something; the copy is probed before it is used.
        """
        raise NotMergeable(f"kind {self.kind!r} has nothing to fold")

    def chain_beside(self, host: ConvKernel) -> Chain:
        """Return the equivalent plain convolutions for this host, as float64 kernels: ``chain()``, which ignores it.

        A kind that ``reads_host`` overrides this one.

        Args:
            host: the layer's own weight and bias in float64.

        Raises:
            NotMergeable: if none exist; the text says why.
        """
        return self.chain()

    def factors(self) -> Factors | None:
        """Return the update as two factors ``B(A x)``, A on the host's own kernel, where that is all there is to it now.

        A frozen convolution then computes it together with its own output (``convpeft.lean``); None: ``forward`` runs.
        """
        return None

    def auxiliary_loss(self) -> Tensor | None:
        """Return a scalar to add to the loss (load balancing, say), or None."""
        return None

    def no_decay(self) -> set[str]:
        """Return the names of own parameters without weight decay: norms, biases and scales."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def extra_repr(self) -> str:
        """Show place, geometry and options when the model is printed."""
        return f"{self.site.place}, {self.site.geometry}, {self.options}{', folded' if self.is_folded else ''}"


def exact(tensor: Tensor) -> Tensor:
    """Return a detached float64 copy, for the algebra of a merge."""
    return tensor.detach().to(torch.float64, copy=True)


def positive(options: AdapterOptions, *names: str) -> Iterator[str]:
    """Yield a sentence for each named option that is not above zero."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            yield f"{name} must be above 0, not {value!r}"


def probability(options: AdapterOptions, *names: str) -> Iterator[str]:
    """Yield a sentence for each named option outside ``[0, 1)``."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < 1:
            yield f"{name} must be at least 0 and below 1, not {value!r}"


def odd_kernels(sizes: tuple[int, ...]) -> Iterator[str]:
    """Yield a sentence for each problem of a list of branch kernel sizes."""
    if not sizes:
        yield "kernel_sizes must name at least one size"
    for size in sizes:
        if size < 1 or size % 2 == 0:
            yield f"kernel_sizes must be odd and at least 1 (a centre is needed), not {size}"


def read_options(adapter: type[Adapter], raw: dict[str, Any]) -> tuple[AdapterOptions | None, list[OptionError]]:
    """Return the checked options of a kind, or None and every problem found.

    Args:
        adapter: the kind's class.
        raw: the rule's options as a spec file gives them; lists stand for tuples.
    """
    known = {field.name: field for field in fields(adapter.Options)}
    hints = hints_of(adapter.Options)  # type: ignore[arg-type]
    problems: list[OptionError] = []
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            near = closest(key, known)
            options = ", ".join(known) or "none"
            problems.append(
                OptionError(
                    f"unknown key {key!r} for kind {adapter.kind!r}. {f'Closest: {near}. ' if near else ''}Its options: {options}."
                )
            )
            continue
        given: Any = tuple(value) if isinstance(value, list) else value
        if not fits(given, hints[key]):
            problems.append(OptionError(f"{key} of kind {adapter.kind!r} must be {_say(hints[key])}, not {given!r}"))
            continue
        values[key] = float(given) if hints[key] is float else given
    missing = [key for key, field in known.items() if _required(field) and key not in raw]
    problems += [OptionError(f"kind {adapter.kind!r} needs the key {key!r}") for key in missing]
    if problems:
        return None, problems
    checked = adapter.Options(**values)
    found = [OptionError(f"kind {adapter.kind!r}: {problem}") for problem in checked.problems()]
    return (None if found else checked), found


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass as types."""
    return typing.get_type_hints(kind)


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from a file is of an annotated type; a whole number is a float too, a bool is no number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if hint is float:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and abs(value) != float("inf")
            and value == value
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _say(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {_say(arguments[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, str(hint))
