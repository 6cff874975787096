"""The registry of adapter kinds by name; built-in kinds and a user's own are registered in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from ..convolution.modes import making_on
from ..errors import RegistrationError, UnknownKind, closest, shown
from .base import Adapter, Site
from .options import AdapterOptions

AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")
LEAVE = "leave"  # a rule of this kind adds no adapter
_KINDS: dict[str, type[Adapter]] = {}
_FAMILIES: dict[str, Family] = {}


class Family(NamedTuple):
    """Kinds that another package brings, under names with one prefix.

    Attributes:
        look_up: returns the class of a kind from its name without the prefix.
        file_refusal: returns why a file may not name a kind with these options, or None; it imports nothing. Its third
            argument is the largest size that the file's tensors give.
    """

    look_up: Callable[[str], type[Adapter]]
    file_refusal: Callable[[str, Mapping[str, Any], int], str | None]


def register_adapter(kind: str) -> Callable[[AdapterClass], AdapterClass]:
    """Return a class decorator that registers an ``Adapter`` subclass under the name ``kind``.

    Specs then use it like a built-in kind. ``convpeft.adapters.base.Adapter`` describes what the class must define.

    Raises:
        RegistrationError: if the name is taken by another class, or the class is not an ``Adapter``.

    Example:
        >>> import convpeft, torch
        >>> from convpeft.adapters import Adapter
        >>> @convpeft.register_adapter("channel_bias")
        ... class ChannelBias(Adapter):
        ...     places = ("output",)
        ...     merge_refusal = "written as an example"
        ...     def __init__(self, site, options):
        ...         super().__init__(site, options)
        ...         self.shift = torch.nn.Parameter(torch.zeros(site.geometry.out_channels, 1, 1))
        ...     def forward(self, x):
        ...         return self.shift.expand_as(x)
        >>> "channel_bias" in convpeft.adapter_kinds()
        True
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
            raise RegistrationError(f"{adapter!r} is not a subclass of convpeft.adapters.Adapter")
        family = next((prefix for prefix in _FAMILIES if kind.startswith(prefix)), None)
        if family is not None:
            owner = family.rstrip(":")
            raise RegistrationError(f"kinds named {family}... belong to the package {owner}; call {kind!r} otherwise")
        taken = _KINDS.get(kind)
        if kind == LEAVE or (taken is not None and taken.__qualname__ != adapter.__qualname__):
            raise RegistrationError(f"kind {kind!r} is taken by {taken.__qualname__ if taken else 'the spec language'}")
        if not adapter.places or set(adapter.places) - {"parallel", "output"}:
            raise RegistrationError(f"{adapter.__qualname__}.places must name 'parallel', 'output' or both")
        adapter.kind = kind
        _KINDS[kind] = adapter
        return adapter

    return register


def register_family(prefix: str, family: Family) -> None:
    """Register a family of kinds: ``adapter_class("<prefix><name>")`` then returns ``family.look_up(name)``."""
    _FAMILIES[prefix] = family


def file_refusal(kind: str, options: Mapping[str, Any], size: int) -> str | None:
    """Return why a file may not name a kind with these options, or None when it may; nothing is imported or built.

    A file may name every kind that is registered: the code of these runs already. Of a family it may name what the
    family says.

    Args:
        kind: as the file names it.
        options: as the file gives them.
        size: the largest size that the file's tensors give to the adapter.
    """
    for prefix, family in _FAMILIES.items():
        if kind.startswith(prefix):
            return family.file_refusal(kind.removeprefix(prefix), options, size)
    return None


def adapter_kinds() -> tuple[str, ...]:
    """Return the names of all registered kinds, sorted.

    The kinds ``peft:<method>`` are not included: they depend on the installed peft, which is imported only when such a
    kind is used. ``convpeft.adapters.peft_kinds.kinds.peft_methods()`` imports it and lists them.

    Example:
        >>> import convpeft
        >>> {"lora", "bottleneck", "rep_mona"} <= set(convpeft.adapter_kinds())
        True
    """
    return tuple(sorted(_KINDS))


def adapter_class(kind: str) -> type[Adapter]:
    """Return the class registered as ``kind``.

    Raises:
        UnknownKind: if there is none; the text lists the nearest registered names.
    """
    name = kind if isinstance(kind, str) else ""  # what a spec says may be anything
    if name in _KINDS:
        return _KINDS[name]
    for prefix, family in _FAMILIES.items():
        if name.startswith(prefix):
            return family.look_up(name.removeprefix(prefix))
    near = closest(name, [*_KINDS, LEAVE])
    raise UnknownKind(
        f"unknown kind {shown(kind)}. {'Closest: ' + near + '. ' if near else ''}Registered: {', '.join(adapter_kinds())}; "
        "and peft:<method> for the methods of peft."
    )


def make_adapter(kind: str, site: Site, options: AdapterOptions, device: torch.device | str) -> Adapter:
    """Return a fresh adapter of a kind on a device; on ``meta`` it has shapes and no memory.

    Raises:
        UnknownKind: with the nearest registered names.
    """
    with making_on(torch.device(device)):
        return adapter_class(kind)(site, options)
