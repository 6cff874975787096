"""Class swap, in and out: the user's module object stays, its class becomes ``Adapted<Base>`` and goes back again.

The module keeps its parameters, buffers, children, hooks and identity. All that convpeft adds is in its ``slots``.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cache, wraps
from types import FunctionType
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..convolution.nodes import is_compiling, is_convolution, is_norm, normalise
from ..errors import HostError
from .buffers import forget, load_buffers
from .checkpoints import Load, load_slots, split_off
from .children import hide, hide_again, is_walk, take_away
from .copies import reduced, self_copying
from .forward import adapted_output, convolved
from .guards import RESETS, Guard, refuse_another_parameter, release, swap_refusal, unless_held
from .keeping import kept_training, note_mode, overrides_train, require_training
from .kept import users_modules
from .slots import HOME, SLOT, Slots, Swapped, base_class, slots_of
from .trainers import guard_trainers
from .trials import exact_copies
from .unfrozen import keep_shown, swap_in


class _SlotsOf:
    """What ``module.convpeft`` gives, also when somebody replaced the dict of the module's children."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        slots = self if module is None else module.__dict__.get(HOME)
        if slots is None:
            raise AttributeError(SLOT)
        return slots


class Adapted(Swapped):
    """Mixin in front of a module's own class, ``adapted_from``; see ``adapted_class``.

    The slots are no child of the module (see ``children``), so its protocols are extended here: what torch does with the
    children, each of these methods does with the slots as well.
    """

    _convpeft: Slots
    _modules: dict[str, Any]
    training: bool
    has_own_train: ClassVar[bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own output with the active adapters added; inside ``route``, each sample its own."""
        slots = self._convpeft
        if slots.router is not None:
            return slots.router.run(self, slots, args, kwargs)
        return self.adapted_forward(*args, **kwargs)

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own output with the active adapters added."""
        slots = self._convpeft
        if slots.active or slots.shown is not None:
            require_training(self, slots)  # type: ignore[arg-type]
        own, left = self._own(args[0] if args else kwargs.get("input"), slots)
        if own is None:
            own, left = super().forward(*args, **kwargs), slots.active  # type: ignore[misc]
        return adapted_output(self, slots, left, own, args, kwargs) if left else own

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        """Return the module's own output, by a cheaper way than its forward, and the adapters still to be added; or None."""
        return None, ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Set the training mode; a held norm stays in eval mode, and what trains goes on training.

        A ``train`` that takes something else, and so is no such method (ultralytics' ``YOLO``), runs as it is.
        """
        slots, mode = self._convpeft, args[0] if args else kwargs.get("mode", True)
        if not isinstance(mode, bool) or len(args) > 1 or not kwargs.keys() <= {"mode"}:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        if slots.phase is not None and (mode or wants_training(self)):  # type: ignore[arg-type]
            slots.phase.trained = True
        slots.wanted_training = mode
        slots.train(mode)
        note_mode(slots, mode)
        with kept_training(self, mode) if self.has_own_train else nullcontext():  # type: ignore[arg-type]
            super().train(*args, **kwargs)  # type: ignore[misc]
        if slots.held:
            self.training = False
        return self

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        """Yield the module and all below it with their names, adapters last."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
        if self._convpeft._modules:
            hide_again(self)  # type: ignore[arg-type]
            yield from self._convpeft.named_modules(memo, f"{prefix}.{SLOT}" if prefix else SLOT, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the module's own children with their names."""
        yield from super().named_children()  # type: ignore[misc]
        if not is_compiling() and is_walk(sys._getframe(1)) and self._convpeft._modules:
            yield SLOT, self._convpeft

    def children(self) -> Iterator[nn.Module]:
        """Yield the module's own children."""
        yield from super().children()  # type: ignore[misc]
        if not is_compiling() and is_walk(sys._getframe(1)) and self._convpeft._modules:
            yield self._convpeft

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's tensors by name, those of its adapters last."""
        given = {**dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)), **kwargs}
        found = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if self._convpeft._modules:
            prefix = f"{given.get('prefix', '')}{SLOT}."
            self._convpeft.state_dict(destination=found, prefix=prefix, keep_vars=given.get("keep_vars", False))
        return found

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        slots, load = self._convpeft, Load(metadata, missing, unexpected, errors)
        entries = split_off(self, slots, state_dict, prefix, load)  # type: ignore[arg-type]
        whole = {**state_dict, **entries}
        load_buffers(self, whole, prefix, metadata)  # type: ignore[arg-type]
        state_dict.update({key: value for key, value in whole.items() if key not in entries})
        slots.loading = True  # with assign=True a load sets parameters
        try:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]
        finally:
            slots.loading = False
        load_slots(slots, entries, prefix, load)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        if args[0] if args else kwargs.get("recurse", True):
            self._convpeft._apply(fn)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        if self._convpeft._modules:  # then it is replicated next
            self._convpeft.replicas.append(replica)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, self.adapted_from, _unpickled, _adapt_again, protocol)

    def __repr__(self) -> str:
        text = super().__repr__()
        if not self._convpeft._modules or not text.endswith(")"):
            return text
        name, _, inside = text.partition("(")
        lines = inside[:-1].strip("\n").rstrip()
        lines = lines if lines.startswith("  ") or not lines else "  " + lines
        added = "  " + f"({SLOT}): {self._convpeft!r}".replace("\n", "\n  ")
        return "\n".join(filter(None, [f"{name}(", lines, added, ")"]))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as usual, but refuse what fusing a norm into the layer would leave."""
        refuse_another_parameter(self, self.__dict__.get(HOME), name, param)
        super().register_parameter(name, param)  # type: ignore[misc]


class _AdaptedConv(Adapted):
    """For convolutions: low-rank updates are computed together with the layer, and frozen layers run lean."""

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        return convolved(self, x, {name: slots._modules[name] for name in slots.active}, slots.lean)


class _AdaptedNorm(Adapted):
    """For norms: frozen ones save their scale only for backward."""

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        return normalise(self, x) if slots.lean else None, slots.active


class _AdaptedSequence(Adapted):
    """For ``nn.Sequential`` and ``nn.ModuleList``, which replace the dict of their children when one is deleted."""

    def __getitem__(self, index: int | slice) -> Any:
        own: Any = (
            self.adapted_from
        )  # named here, for the compiler cannot follow a class that is swapped while it traces
        if isinstance(index, slice) and own.__getitem__ is nn.Sequential.__getitem__:
            return own(OrderedDict(list(self._modules.items())[index]))
        if isinstance(index, slice) and own.__getitem__ is nn.ModuleList.__getitem__:
            return own(list(self._modules.values())[index])
        return super().__getitem__(index)  # type: ignore[misc]

    def __delitem__(self, index: int | slice) -> None:
        super().__delitem__(index)  # type: ignore[misc]
        hide_again(self)  # type: ignore[arg-type]


class _AdaptedModuleDict(Adapted):
    """For ``nn.ModuleDict``, which asks the dict of its children what its entries are."""

    def __contains__(self, key: str) -> bool:
        return key != SLOT and super().__contains__(key)  # type: ignore[misc]


@cache
def adapted_class(base: Any) -> Any:
    """Return the generated subclass ``Adapted<Base>``: the mixin in front of exactly ``base``."""
    guard_trainers([base])
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
    body.update(has_own_train=overrides_train(base), __init__=_own_class_instead(base))
    if not hasattr(base, SLOT):
        body[SLOT] = _SlotsOf()
    body.update(
        {method: unless_held(method) for method in RESETS if callable(getattr(base, "reset_running_stats", None))}
    )
    body.update(self_copying(base, _adapt_again))
    has_children = not (is_convolution(base) or is_norm(base) or issubclass(base, nn.Linear))
    if has_children:
        body["forward"] = _forward_like(base)
    return type(f"Adapted{base.__name__}", (mixin, Guard, base) if has_children else (mixin, base), body)


def _forward_like(base: Any) -> Any:
    """Return ``Adapted.forward`` with the signature of a class's own forward: trainers ask it which inputs a model takes."""
    own = Adapted.forward
    made = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    made.__doc__, made.__qualname__ = own.__doc__, own.__qualname__
    with suppress(TypeError, ValueError):  # of a class whose forward has none
        made.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return made


def _own_class_instead(base: Any) -> Any:
    """Return a constructor that makes a plain ``base``: for a module's own ``type(self)(...)``, a slice for example."""

    @wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if HOME not in self.__dict__:
            self.__class__ = base
        base.__init__(self, *args, **kwargs)

    return __init__


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
    hide(module, slots)
    try:
        module.__class__ = adapted_class(base)
    except BaseException as error:
        take_away(module)
        if isinstance(error, TypeError):
            raise HostError(f"{base.__name__} does not allow its class to be extended: {error}") from error
        raise
    return slots


def can_be_kept_training(module: nn.Module) -> bool:
    """Return whether a module has a ``train()`` of its own that might freeze what is below, and allows the class swap."""
    if not overrides_train(module) or swap_refusal(module) is not None:
        return False
    base: Any = base_class(module)
    try:
        adapted_class(base)
    except TypeError:
        return False
    return True


def restore(module: nn.Module) -> None:
    """Give the module its own class back and take out all that convpeft keeps in it, in place."""
    slots = slots_of(module)
    if slots is None:
        return
    swap_in(module, None)
    module.__class__ = restored_class(module)
    take_away(module)
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
    forget(users_modules(plain))
    return plain


def wants_training(module: nn.Module) -> bool:
    """Return the mode last set by ``train()``; a norm held in eval mode says False in ``training`` all the same."""
    slots = slots_of(module)
    return slots.wanted_training if slots is not None and slots.held else module.training


def hold(module: nn.Module, held: bool) -> None:
    """Keep a norm in eval mode from now on, or let it follow ``train()`` again, in place."""
    slots = adapt(module)
    if held:  # in this order each line may be interrupted, and all of them run again
        if not slots.held:
            slots.wanted_training = module.training
        slots.held = True
        module.__dict__["training"] = False
    elif slots.held:
        module.__dict__["training"] = slots.wanted_training
        slots.held = False


def _adapt_again(module: Any, slots: Slots | None) -> None:
    """Give a bare copy of a swapped module the class and the child that its original has, in place."""
    if slots is not None and slots_of(module) is None:
        own: Any = type(module)
        module.__class__ = adapted_class(own)
        hide(module, slots)


def _unpickled(base: Any) -> nn.Module:
    """Return an empty module of the adapted class, for pickle to fill."""
    return adapted_class(base).__new__(adapted_class(base))
