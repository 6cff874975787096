"""What convpeft remembers of a model: which adapters live where. Plain data on the root, so copies carry it along."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .adapters.base import Adapter
from .errors import StateError, UnknownAdapter, closest
from .hosting import Slots, slots_of

ATTRIBUTE = "_convpeft_state"


@dataclass
class LayerRecord:
    """One adapter on one layer, as plain data.

    Attributes:
        kind, place, options: what makes the adapter.
        geometry: of its site, as ``ConvGeometry.to_dict`` gives it.
        output: the adapted entry of the module's output, or None.
        lr_mult: relative learning rate.
        rule: number of the rule that asked for it.
    """

    kind: str
    place: str
    options: dict[str, Any]
    geometry: dict[str, Any]
    output: int | str | None = None
    lr_mult: float = 1.0
    rule: int = 0


@dataclass
class AdapterRecord:
    """One adapter of the model, over all its layers.

    Attributes:
        spec: the spec it came from, as plain data.
        layers: by module name.
        owned: names of modules whose tensors the adapter brings its own values of, with their relative learning rate.
        norm: the norm policy while it is active.
    """

    spec: dict[str, Any]
    layers: dict[str, LayerRecord]
    owned: dict[str, float]
    norm: str = "frozen"


@dataclass
class ModelState:
    """All of it.

    Attributes:
        adapters: by name, in the order of arrival.
        active: names of the active ones.
        trained: names of those whose parameters require gradients: the active ones, outside of ``using``.
        requires_grad: what each of the user's parameters was set to before the first injection.
        swapped: names of all modules whose class is swapped.
        norms: names of all BatchNorm-like modules.
        held: whether these are held in eval mode now; None before the first switch.
        routed: names of the adapters that samples go through inside ``route``; else None.
    """

    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    swapped: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    held: bool | None = None
    routed: tuple[str, ...] | None = None

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the adapters that take part in a forward pass now."""
        return self.active if self.routed is None else self.routed


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that was given to ``inject``, behind DDP, ``torch.compile`` and outer modules; else ``model``."""
    if ATTRIBUTE in model.__dict__:
        return model
    found = [module for module in model.modules() if ATTRIBUTE in module.__dict__]
    if len(found) > 1:
        raise StateError(
            f"{len(found)} parts of this {type(model).__name__} have adapters of their own: name one of them"
        )
    return found[0] if found else model


def find_state(model: nn.Module) -> ModelState | None:
    """Return the state of a model, or None when nothing is injected."""
    return unwrapped(model).__dict__.get(ATTRIBUTE)


def require_state(model: nn.Module) -> tuple[nn.Module, ModelState]:
    """Return the injected root and its state.

    Raises:
        StateError: if nothing is injected.
    """
    root = unwrapped(model)
    state = root.__dict__.get(ATTRIBUTE)
    if state is None:
        raise StateError(f"this {type(model).__name__} has no adapters: convpeft.inject(model, spec) puts them in")
    return root, state


def record_of(state: ModelState, name: str) -> AdapterRecord:
    """Return the record of an adapter.

    Raises:
        UnknownAdapter: with the names there are.
    """
    if name not in state.adapters:
        near = closest(name, state.adapters, 1)
        hint = f" Did you mean {near!r}?" if near else ""
        raise UnknownAdapter(f"no adapter is named {name!r}; there are: {', '.join(state.adapters) or 'none'}.{hint}")
    return state.adapters[name]


def module_at(root: nn.Module, name: str) -> nn.Module:
    """Return the user's module of that name (the root for the empty name).

    Raises:
        StateError: if the model was changed and it is gone.
    """
    module: nn.Module | None = root
    for part in name.split(".") if name else ():
        module = module._modules.get(part)  # type: ignore[union-attr]  # not get_submodule: switching looks up hundreds
        if module is None:
            raise StateError(f"{name!r} was adapted and is no longer in the model: it was changed after inject()")
    return module  # type: ignore[return-value]


def slots_at(root: nn.Module, name: str) -> Slots:
    """Return the slots of the swapped module of that name.

    Raises:
        StateError: if the module was replaced by another.
    """
    slots = slots_of(module_at(root, name))
    if slots is None:
        raise StateError(
            f"{name!r} was adapted and has been replaced by a plain {type(module_at(root, name)).__name__}"
        )
    return slots


def require_hosts(root: nn.Module, state: ModelState) -> None:
    """Raise a StateError that names a swapped module which is gone, or was replaced by another; else do nothing."""
    for name in state.swapped:
        slots_at(root, name)


def adapter_at(root: nn.Module, layer: str, name: str) -> Adapter:
    """Return the adapter called ``name`` on a layer."""
    adapter = slots_at(root, layer)._modules.get(name)
    if not isinstance(adapter, Adapter):
        raise StateError(f"{layer!r} has lost its adapter {name!r}: it was changed after inject()")
    return adapter
