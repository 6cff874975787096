"""Class swap in and out: the user's module object stays, its class becomes ``Adapted<Base>`` and goes back again.

The module keeps its parameters, buffers, hooks and identity. All that convpeft adds lives in one child named
``convpeft``: the adapters by name, and the tensors that are exchanged when adapters with unfrozen parts swap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adding import add_to_entry, convolved, update
from .checkpoints import BASE, SLOT, STASH, route_checkpoint
from .errors import HostError
from .guards import refuse_another_bias, refusing, restored_class
from .lean import is_convolution, is_norm, normalise

FUSING_METHODS = ("fuse", "fuse_convs", "reparameterize", "switch_to_deploy", "convert_to_deploy", "deploy")


class Tensors(nn.Module):
    """Parameters and buffers of one owner that are not in the layer at the moment, under the layer's own names."""

    def forward(self) -> None:
        """Never called: a drawer, not a layer."""
        raise NotImplementedError


class Slots(nn.ModuleDict):
    """What one module carries: adapters by name, exchanged tensors, and whether its norm is held.

    Attributes:
        active: names of the adapters that take part in the forward pass, in order.
        owners: names of the adapters that bring their own values of this module's tensors.
        shown: the owner whose values the module shows now, or None for the base's.
        held: keep this norm in eval mode whatever ``train()`` says.
        lean: keep for backward only what a frozen layer's gradients need.
        router: deals the samples of a batch out to their adapters, inside ``convpeft.route``; else None.
        wanted_training: the mode last asked for while held.
        loading: a state_dict is being loaded into the module.
    """

    loading = False

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.owners: tuple[str, ...] = ()
        self.shown: str | None = None
        self.held = False
        self.lean = False
        self.router: Any = None
        self.wanted_training = True
        self.outputs: dict[str, int | str | None] = {}

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module  # ModuleDict refuses names such as "train"; adapters may be called anything

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # Module would refuse an attribute that an adapter is called like

    def adapters(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the adapters by name."""
        return ((name, module) for name, module in self._modules.items() if name != STASH)

    def drawer(self, owner: str) -> Tensors:
        """Return the drawer of an owner's tensors, made when first asked for."""
        if STASH not in self._modules:
            self._modules[STASH] = Slots()
        stash = self._modules[STASH]
        if owner not in stash._modules:
            stash._modules[owner] = Tensors()
        return stash._modules[owner]  # type: ignore[return-value]

    def is_idle(self) -> bool:
        """Whether nothing is left here that a module would need the class swap for."""
        return not any(True for _ in self.adapters()) and not self.owners and not self.held

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Load as usual; an adapter that a checkpoint has no word about (a base checkpoint, say) stays as it is."""
        for name, module in self._modules.items():
            if name == STASH or any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                continue
            for key, value in module.state_dict(keep_vars=True).items():
                state_dict[f"{prefix}{name}.{key}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)


class Adapted:
    """Mixin in front of a module's own class, ``adapted_from``; see ``adapted_class``."""

    adapted_from: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own output with the active adapters added, for each sample its own inside ``route``."""
        slots = self._modules[SLOT]  # type: ignore[attr-defined]
        if slots.router is not None:
            return slots.router.run(self, slots, args, kwargs)
        return self.adapted_forward(*args, **kwargs)

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's own output with the active adapters added."""
        slots = self._modules[SLOT]  # type: ignore[attr-defined]
        own, left = self._own(args[0] if args else kwargs.get("input"), slots)
        if own is None:
            own, left = super().forward(*args, **kwargs), slots.active  # type: ignore[misc]
        output = own
        for name in left:
            adapter = slots._modules[name]
            if adapter.site.place == "parallel":
                x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
                output = output + update(self, adapter, x, own)  # type: ignore[arg-type]
            else:
                output = add_to_entry(own, output, slots.outputs.get(name), adapter)
        return output

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        """Return the module's own output, by a cheaper way than its forward, and the adapters still to be added; or None."""
        return None, ()

    def train(self, mode: bool = True) -> Any:
        """Set the training mode; a held norm stays in eval mode."""
        slots = self._modules[SLOT]  # type: ignore[attr-defined]
        slots.wanted_training = mode
        super().train(mode)  # type: ignore[misc]
        if slots.held:
            self.training = False
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        getstate = getattr(self, "__getstate__", None)
        state = getstate() if getstate is not None else self.__dict__
        return _rebuild, (self.adapted_from,), state

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as usual, but refuse what fusing a norm into the layer would leave."""
        if name == "bias" and param is not None:
            refuse_another_bias(self, self._modules.get(SLOT))  # type: ignore[attr-defined]
        super().register_parameter(name, param)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self._modules[SLOT].owners:  # type: ignore[attr-defined]
            shown = {owner: shown_tensors(self, owner) for owner in (BASE, *self._modules[SLOT].owners)}  # type: ignore
            route_checkpoint(shown, self._modules[SLOT].shown or BASE, state_dict, prefix, args[-1])  # type: ignore
        slots = self._modules[SLOT]  # type: ignore[attr-defined]
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
    """For norms: frozen ones keep their scale only."""

    def _own(self, x: Any, slots: Slots) -> tuple[Any, tuple[str, ...]]:
        return normalise(self, x) if slots.lean else None, slots.active


class _AdaptedSequence(Adapted):
    """For ``nn.Sequential`` and ``nn.ModuleList``: the extra child is no step of it."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for name, module in self._modules.items() if name != SLOT])  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._modules) - 1  # type: ignore[attr-defined]

    def __getitem__(self, index: int | slice) -> Any:
        plain = list(self)
        if isinstance(index, slice):
            names = [name for name in self._modules if name != SLOT][index]  # type: ignore[attr-defined]
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
        return len(self._modules) - 1  # type: ignore[attr-defined]

    def keys(self) -> Any:
        """Return the names of the entries."""
        return dict(self.items()).keys()

    def values(self) -> Any:
        """Return the entries."""
        return dict(self.items()).values()

    def items(self) -> Any:
        """Return the entries with their names."""
        return {name: module for name, module in self._modules.items() if name != SLOT}.items()  # type: ignore[attr-defined]


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
    for method in FUSING_METHODS:
        if callable(getattr(base, method, None)):
            body[method] = refusing(method)
    return type(f"Adapted{base.__name__}", (mixin, base), body)


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's own class, behind the swap if there is one."""
    return module.adapted_from if isinstance(module, Adapted) else type(module)


def swapped_class(module: nn.Module) -> Any:
    """Return the class that the swap gives a module, whatever was put on top of it since."""
    base: Any = base_class(module)
    return adapted_class(base)


def slots_of(module: nn.Module) -> Slots | None:
    """Return what convpeft put into the module, or None."""
    return module._modules[SLOT] if isinstance(module, Adapted) else None  # type: ignore[return-value]


def adapt(module: nn.Module) -> Slots:
    """Swap the module's class in place and return its slots; a module already swapped is left as it is.

    Raises:
        HostError: if Python or the module's class does not allow it.
    """
    present = slots_of(module)
    if present is not None:
        return present
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
    show(module, None)
    module.__class__ = restored_class(module, swapped_class(module))
    del module._modules[SLOT]
    if slots.held:
        module.training = slots.wanted_training


def wants_training(module: nn.Module) -> bool:
    """Return the mode ``train()`` last asked a module for, which a held norm does not show."""
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


def add_owner(module: nn.Module, owner: str, drawer: Tensors) -> None:
    """Let ``owner`` bring its own values of the module's tensors, in place (not shown yet)."""
    slots = adapt(module)
    slots.drawer(owner)
    slots._modules[STASH]._modules[owner] = drawer  # type: ignore[union-attr]
    slots.owners = (*slots.owners, owner)


def settle(module: nn.Module) -> None:
    """Make the values shown now the module's only ones, in place: every other owner's, and the base's, are dropped."""
    slots = slots_of(module)
    if slots is None or not slots.owners:
        return
    slots.owners, slots.shown = (), None
    del slots._modules[STASH]


def remove_owner(module: nn.Module, owner: str) -> None:
    """Forget an owner's values, in place; the base's come back if the owner's were shown."""
    slots = slots_of(module)
    assert slots is not None
    if slots.shown == owner:
        show(module, None)
    slots.owners = tuple(name for name in slots.owners if name != owner)
    stash = slots._modules[STASH]
    assert stash is not None
    del stash._modules[owner]
    if not slots.owners:
        del slots._modules[STASH]


def show(module: nn.Module, owner: str | None) -> None:
    """Exchange the module's tensors by reference so that it shows ``owner``'s values (None: the base's), in place."""
    slots = slots_of(module)
    if slots is None or slots.shown == owner:
        return
    if slots.shown is not None:
        _exchange(module, slots.drawer(BASE), slots.drawer(slots.shown))
        del slots._modules[STASH]._modules[BASE]  # type: ignore[union-attr]
    if owner is not None:
        _exchange(module, slots.drawer(owner), slots.drawer(BASE))
    slots.shown = owner


def shown_tensors(module: nn.Module, owner: str) -> dict[str, Tensor]:
    """Return an owner's tensors by name (``_base`` for the base's), wherever they are now."""
    slots = slots_of(module)
    if slots is None or slots.shown == owner or (owner == BASE and slots.shown is None):
        tensors = {**module._parameters, **module._buffers}
        hidden = module._non_persistent_buffers_set
    else:
        drawer = slots.drawer(owner)
        tensors, hidden = {**drawer._parameters, **drawer._buffers}, set()
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and name not in hidden}


def _exchange(module: nn.Module, source: Tensors, target: Tensors) -> None:
    """Move the tensors in ``source`` into the module, and those they displace into ``target``."""
    for store in ("_parameters", "_buffers"):
        incoming, place, outgoing = getattr(source, store), getattr(module, store), getattr(target, store)
        for name in list(incoming):
            outgoing[name] = place[name]
            place[name] = incoming.pop(name)


def _rebuild(base: Any) -> nn.Module:
    return adapted_class(base).__new__(adapted_class(base))


def is_batchnorm_like(module: nn.Module) -> bool:
    """Return whether the module keeps running statistics that training changes (BatchNorm, SyncBN, timm's)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    buffers = dict(module._buffers.items())  # a TorchScript module has no dict here
    return all(buffers.get(name) is not None for name in ("running_mean", "running_var"))


def base_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module of the user's with its name, all names of a shared one, none of convpeft's."""
    mark = f".{SLOT}."
    return [
        (name, module)
        for name, module in root.named_modules(remove_duplicate=False)
        if mark not in f".{name}." or not _is_ours(root, name)
    ]


def _is_ours(root: nn.Module, name: str) -> bool:
    """Whether a name with a part ``convpeft`` leads into our child (a user may have a module of that name)."""
    module: nn.Module = root
    for part in name.split("."):
        if part == SLOT and isinstance(module, Adapted):
            return True
        child = module._modules.get(part)
        if child is None:
            return False
        module = child
    return False


def device_and_dtype(modules: Sequence[nn.Module]) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of the first floating parameter or buffer found, torch's defaults without any."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
