"""The registry of adapter kinds by name; built-in kinds and a user's own are registered in the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import RegistrationError, UnknownKind, closest
from .base import Adapter, Site
from .options import AdapterOptions

AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")
LEAVE = "leave"  # a rule of this kind adds no adapter
_KINDS: dict[str, type[Adapter]] = {}
_FAMILIES: dict[str, Callable[[str], type[Adapter]]] = {}


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


def register_family(prefix: str, lookup: Callable[[str], type[Adapter]]) -> None:
    """Register a family of kinds: ``adapter_class("<prefix><name>")`` then returns ``lookup(name)``."""
    _FAMILIES[prefix] = lookup


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
    if kind in _KINDS:
        return _KINDS[kind]
    for prefix, lookup in _FAMILIES.items():
        if str(kind).startswith(prefix):
            return lookup(kind.removeprefix(prefix))
    near = closest(str(kind), [*_KINDS, LEAVE])
    raise UnknownKind(
        f"unknown kind {kind!r}. {'Closest: ' + near + '. ' if near else ''}Registered: {', '.join(adapter_kinds())}; "
        "and peft:<method> for the methods of peft."
    )


def make_adapter(kind: str, site: Site, options: AdapterOptions, device: torch.device | str) -> Adapter:
    """Return a fresh adapter of a kind on a device; on ``meta`` it has shapes and no memory.

    Raises:
        UnknownKind: with the nearest registered names.
    """
    with torch.device(device):
        return adapter_class(kind)(site, options)
