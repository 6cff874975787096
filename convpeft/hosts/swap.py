"""Class swap, in and out: the user's module object stays, its class becomes ``Adapted<Base>`` and goes back again.

The module keeps its parameters, buffers, hooks and identity. All that convpeft adds is in one child, see ``slots``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..convolution.nodes import is_convolution, is_norm, normalise
from ..errors import HostError
from .copies import reduced, self_copying
from .forward import adapted_output, convolved
from .guards import Guard, refuse_another_parameter, release
from .slots import SLOT, Slots, Swapped, base_class, slots_of
from .trials import exact_copies
from .unfrozen import keep_shown, route_checkpoint, swap_in


class Adapted(Swapped):
    """Mixin in front of a module's own class, ``adapted_from``; see ``adapted_class``."""

    _modules: dict[str, Any]
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own output with the active adapters added; inside ``route``, each sample its own."""
        slots: Slots = self._modules[SLOT]
        if slots.router is not None:
            return slots.router.run(self, slots, args, kwargs)
        return self.adapted_forward(*args, **kwargs)

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own output with the active adapters added."""
        slots: Slots = self._modules[SLOT]
        own, left = self._own(args[0] if args else kwargs.get("input"), slots)
        if own is None:
            own, left = super().forward(*args, **kwargs), slots.active  # type: ignore[misc]
        return adapted_output(self, slots, left, own, args, kwargs) if left else own

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        """Return the module's own output, by a cheaper way than its forward, and the adapters still to be added; or None."""
        return None, ()

    def train(self, mode: bool = True) -> Any:
        """Set the training mode; a held norm stays in eval mode."""
        slots: Slots = self._modules[SLOT]
        slots.wanted_training = mode
        super().train(mode)  # type: ignore[misc]
        if slots.held:
            self.training = False
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, self.adapted_from, _unpickled, _adapt_again, protocol)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as usual, but refuse what fusing a norm into the layer would leave."""
        refuse_another_parameter(self, self._modules.get(SLOT), name, param)
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        slots: Slots = self._modules[SLOT]
        if slots.owners:
            route_checkpoint(self, slots, state_dict, prefix, args[-1])  # type: ignore[arg-type]
        slots.loading = True  # with assign=True a load sets parameters
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        finally:
            slots.loading = False


class _AdaptedConv(Adapted):
    """For convolutions: low-rank updates are computed together with the layer, and frozen layers run lean."""

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        return convolved(self, x, {name: slots._modules[name] for name in slots.active}, slots.lean)


class _AdaptedNorm(Adapted):
    """For norms: frozen ones save their scale only for backward."""

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        return normalise(self, x) if slots.lean else None, slots.active


class _AdaptedSequence(Adapted):
    """For ``nn.Sequential`` and ``nn.ModuleList``: the extra child is no step of it."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != SLOT])

    def __len__(self) -> int:
        return len(self._modules) - 1

    def __getitem__(self, index: int | slice) -> Any:
        plain = list(self)
        if isinstance(index, slice):
            names = [name for name in self._modules if name != SLOT][index]
            picked = nn.Sequential() if isinstance(self, nn.Sequential) else nn.ModuleList()
            for name, module in zip(names, plain[index], strict=True):
                picked._modules[name] = module
            return picked
        return plain[index]


class _AdaptedModuleDict(Adapted):
    """For ``nn.ModuleDict`` with a forward of its own: the extra child is no entry of it."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __len__(self) -> int:
        return len(self._modules) - 1

    def keys(self) -> Any:
        """Return the names of the entries."""
        return dict(self.items()).keys()

    def values(self) -> Any:
        """Return the entries."""
        return dict(self.items()).values()

    def items(self) -> Any:
        """Return the entries with their names."""
        return {name: module for name, module in self._modules.items() if name != SLOT}.items()


@cache
def adapted_class(base: Any) -> Any:
    """Return the generated subclass ``Adapted<Base>``: the mixin in front of exactly ``base``."""
    mixin: type = Adapted
    if issubclass(base, (nn.Sequential, nn.ModuleList)):
        mixin = _AdaptedSequence
    elif issubclass(base, nn.ModuleDict):
        mixin = _AdaptedModuleDict
    elif is_convolution(base):
        mixin = _AdaptedConv
    elif is_norm(base):
        mixin = _AdaptedNorm
    body: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__, "adapted_from": base}
    body.update(self_copying(base, _adapt_again))
    has_children = not (is_convolution(base) or is_norm(base) or issubclass(base, nn.Linear))
    return type(f"Adapted{base.__name__}", (mixin, Guard, base) if has_children else (mixin, base), body)


def adapt(module: nn.Module) -> Slots:
    """Swap the module's class in place and return its slots; a module already swapped is left as it is.

    Raises:
        HostError: if Python or the module's class does not allow it.
    """
    present = slots_of(module)
    if present is not None:
        return present
    release(module)
    base: Any = type(module)
    slots = Slots()
    slots.wanted_training = slots.training = module.training
    try:
        module.__class__ = adapted_class(base)
    except TypeError as error:
        raise HostError(f"{base.__name__} does not allow its class to be extended: {error}") from error
    module._modules[SLOT] = slots
    return slots


def restore(module: nn.Module) -> None:
    """Give the module its own class back and take out the ``convpeft`` child, in place."""
    slots = slots_of(module)
    if slots is None:
        return
    swap_in(module, None)
    module.__class__ = restored_class(module)
    del module._modules[SLOT]
    if slots.held:
        module.training = slots.wanted_training


def restored_class(module: nn.Module) -> Any:
    """Return the class a swapped module has without our swap; a parametrisation put on top of it since is kept.

    Raises:
        HostError: if something else extended the class (``fully_shard``, say).
    """
    base: Any = base_class(module)
    now, swapped = type(module), adapted_class(base)
    if now is swapped:
        return base
    if not is_parametrized(module) or now.__bases__ != (swapped,):
        raise HostError(
            f"its class was extended after inject(), to {now.__name__}, and convpeft cannot take itself out from under that. "
            "Undo it first. FSDP2's fully_shard cannot be undone: save the adapter, and load it into a model that is not sharded"
        )
    body = {key: value for key, value in vars(now).items() if key not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), body)


def check_restorable(name: str, module: nn.Module) -> None:
    """Raise if a swapped module cannot get its own class back.

    Raises:
        HostError: if its class was extended, or its forward replaced, after ``inject`` by something that cannot be kept.
    """
    slots = slots_of(module)
    try:
        restored_class(module)
        if "forward" in module.__dict__ and slots is not None and any(slots.adapters()):
            raise HostError(
                "its forward was replaced on the object itself after inject() (by accelerate's hooks?), and would go on "
                "asking for the adapter. Undo it first"
            )
    except HostError as error:
        raise HostError(f"{name or '(root)'}: {error}; the model is unchanged.") from None


def plain_copy(module: nn.Module) -> Any:
    """Return a copy without adapters, with the values that are shown now, in float64 on the CPU and in eval mode."""
    (plain,) = exact_copies([module])
    keep_shown(plain)
    restore(plain)
    return plain


def wants_training(module: nn.Module) -> bool:
    """Return the mode last set by ``train()``; a norm held in eval mode says False in ``training`` all the same."""
    slots = slots_of(module)
    return slots.wanted_training if slots is not None and slots.held else module.training


def hold(module: nn.Module, held: bool) -> None:
    """Keep a norm in eval mode from now on, or let it follow ``train()`` again, in place."""
    slots = adapt(module)
    if held and not slots.held:
        slots.wanted_training = module.training
    if held or slots.held:
        module.training = slots.wanted_training and not held
    slots.held = held


def _adapt_again(module: Any, slots: Slots | None) -> None:
    """Give a bare copy of a swapped module the class and the child that its original has, in place."""
    if slots is not None and slots_of(module) is None:
        own: Any = type(module)
        module.__class__ = adapted_class(own)
        module._modules[SLOT] = slots


def _unpickled(base: Any) -> nn.Module:
    """Return an empty module of the adapted class, for pickle to fill."""
    return adapted_class(base).__new__(adapted_class(base))
