"""One handle on an adapted model: its root module, the records of what is injected, and the modules behind the names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..adapters.base import Adapter
from ..errors import StateError, UnknownAdapter, closest, shortened
from .journal import Journal
from .modules import base_modules
from .moves import follow_moves
from .records import ATTRIBUTE, AdapterRecord, ModelState
from .slots import BASE, Slots, Swapped, base_class, slots_of
from .swap import check_restorable, restore
from .trained import train_only
from .transaction import settle
from .unfrozen import remove_owner, tensors_of
from .wrappers import inside


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that was given to ``inject``, behind outer modules; else ``model`` without its wrappers.

    Wrappers are those of DDP, DataParallel and ``torch.compile``.
    """
    model = inside(model)
    if ATTRIBUTE in model.__dict__:
        return model
    found = [module for module in model.modules() if ATTRIBUTE in module.__dict__]
    if len(found) > 1:
        raise StateError(
            f"{len(found)} parts of this {type(model).__name__} have adapters of their own: name one of them"
        )
    return found[0] if found else model


def whole(model: nn.Module) -> nn.Module:
    """Return the module that adapters are put into: ``unwrapped(model)``, if that leaves nothing of the model out.

    Raises:
        StateError: if a part of the model has adapters of its own, and there are layers outside of that part.
    """
    root, outer = unwrapped(model), inside(model)
    if root is outer:
        return root
    below = {id(module) for module in root.modules()}
    named = base_modules(outer)
    left = [name for name, module in named if id(module) not in below and _has_parameters(module)]
    if left:
        part = next(name for name, module in named if module is root)
        raise StateError(
            f"the part {part!r} of this {base_class(outer).__name__} has adapters of its own, and nothing outside of it could "
            f"get any ({shortened(left, 3)}). Give that part, with names as they are in it, or take its adapters out first: "
            f"convpeft.eject(model.{part}); the model is unchanged."
        )
    return root


def refuse_part(model: nn.Module) -> None:
    """Raise a StateError if a model without records has modules that convpeft changed: they belong to a whole."""
    if any(isinstance(module, Swapped) for module in model.modules()):
        raise StateError(
            f"this {base_class(model).__name__} is part of a model that has adapters already, or a copy of such a part, or "
            "shares modules with one. Call convpeft on that model, with patterns for this part, or eject its adapters first."
        )


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


@dataclass
class AdaptedModel:
    """A model with adapters in it. Make one for each use: modules that were looked up once are not looked up again.

    Attributes:
        root: the module that was given to ``inject``.
        state: the records, kept in an attribute of the root.
        since: the number of changes made before the handle.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> _ = convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}, name="screw")
        >>> [(layer, adapter.kind) for layer, adapter in convpeft.AdaptedModel.of(model).adapters("screw")]
        [('0', 'lora')]
    """

    root: nn.Module
    state: ModelState
    _found: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    since: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.since = self.state.changes

    @classmethod
    def find(cls, model: nn.Module) -> AdaptedModel | None:
        """Return the handle of a model, or None when nothing is injected.

        Raises:
            StateError: if it is a part of a model with adapters, or two parts of it have adapters of their own; if another
                thread is changing the model's adapters.
        """
        root = unwrapped(model)
        state = root.__dict__.get(ATTRIBUTE)
        if state is not None and state.journal is not None:
            settle(root, state)
            state = root.__dict__.get(ATTRIBUTE)
        if state is None:
            refuse_part(root)
            return None
        found = cls(root, state)
        if state.trains_outside is not None and state.routed is None:  # a copy that was made inside route
            train_only(found, state.trains_outside, Journal())
            state.trains_outside = None
        return found

    @classmethod
    def of(cls, model: nn.Module) -> AdaptedModel:
        """Return the handle of a model with adapters.

        Raises:
            StateError: if nothing is injected, or it is a part of a model with adapters.
        """
        found = cls.find(model)
        if found is None:
            raise StateError(f"this {type(model).__name__} has no adapters: convpeft.inject(model, spec) puts them in")
        return found

    def record(self, name: str) -> AdapterRecord:
        """Return the record of an adapter.

        Raises:
            UnknownAdapter: with the names there are.
        """
        adapters = self.state.adapters
        if name not in adapters:
            near = closest(name, adapters, 1)
            hint = f" Did you mean {near!r}?" if near else ""
            raise UnknownAdapter(f"no adapter is named {name!r}; there are: {', '.join(adapters) or 'none'}.{hint}")
        return adapters[name]

    def module(self, name: str) -> nn.Module:
        """Return the user's module of that name (the root for the empty name).

        Raises:
            StateError: if the model was changed and it is gone.
        """
        if name not in self._found:
            module: nn.Module = self.root
            for part in name.split(".") if name else ():
                child = module._modules.get(part)  # faster than get_submodule
                if child is None:
                    child = inside(module)._modules.get(part)
                if child is None:
                    raise StateError(
                        f"{name!r} was adapted and is no longer in the model: it was changed after inject()"
                    )
                module = child
            self._found[name] = inside(module)
        return self._found[name]

    def slots(self, name: str) -> Slots:
        """Return the slots of the swapped module of that name.

        Raises:
            StateError: if the module is gone, or was replaced by another.
        """
        module = self.module(name)
        slots = slots_of(module)
        if slots is None:
            raise StateError(f"{name!r} was adapted and has been replaced by a plain {type(module).__name__}")
        return slots

    def adapter(self, layer: str, name: str) -> Adapter:
        """Return the adapter called ``name`` on a layer.

        Raises:
            StateError: if it is gone.
        """
        adapter = self.slots(layer).get(name)
        if not isinstance(adapter, Adapter):
            raise StateError(f"{layer!r} has lost its adapter {name!r}: it was changed after inject()")
        return adapter

    def adapters(self, name: str) -> Iterator[tuple[str, Adapter]]:
        """Yield the adapters of one name with the names of their layers."""
        return ((layer, self.adapter(layer, name)) for layer in self.record(name).layers)

    def unfrozen(self, name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each module that an adapter unfroze, by name, with the adapter's own values of its tensors."""
        return ((key, tensors_of(self.module(key), name)) for key in self.record(name).owned)

    def tensors(self, module: str, name: str | None = None) -> dict[str, Tensor]:
        """Return an unfrozen module's tensors as an adapter has them (None: as the base has them)."""
        return tensors_of(self.module(module), BASE if name is None else name)

    def replace(self, layer: str, name: str, adapter: Adapter) -> None:
        """Put another adapter in the place of the one called ``name`` on a layer, in place."""
        self.adapter(layer, name)
        self.slots(layer).replace(name, adapter)

    def freeze_again(self, module: str, name: str) -> None:
        """Drop an adapter's own values of a module's tensors, in place; the base's count from then on."""
        remove_owner(self.module(module), name)
        del self.record(name).owned[module]

    def touched(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Return, by name, every module that one of the named adapters sits on or unfroze."""
        records = [self.record(name) for name in names]
        return {key: self.module(key) for record in records for key in (*record.layers, *record.owned)}

    def require_hosts(self) -> None:
        """Raise a StateError that names a swapped module which is gone, or was replaced by another.

        Modules that were only moved, by deleting from a Sequential for example, get their new names in the records.
        """
        if any(self._key_at(name) != name for name in self.state.swapped):
            follow_moves(self.root, self.state)
            self._found.clear()

    def _key_at(self, name: str) -> str | None:
        """Return under which name the module that is now called ``name`` was swapped; None if it was not."""
        try:
            module = self.module(name)
            slots = slots_of(module)
            if slots is None:
                return None
            return name if slots.key == name or self.module(slots.key) is module else slots.key  # a second name of it
        except StateError:
            return None

    def require_unrouted(self) -> None:
        """Raise a StateError inside ``route``, or inside a block of another thread; else do nothing."""
        for block in self.state.blocks:
            if block.is_elsewhere:
                raise block.refusal(self.root)
        if self.state.routed is not None:
            raise StateError("the model is inside convpeft.route(...): leave that block before you change its adapters")

    def check_restorable(self) -> None:
        """Raise if some swapped module cannot get its own class back; asked before anything is touched.

        Raises:
            StateError: if one is gone or was replaced.
            HostError: if one was extended, or its forward replaced, after ``inject``.
        """
        self.require_hosts()
        for name in self.state.swapped:
            check_restorable(name, self.module(name))

    def restore(self, names: Iterable[str]) -> None:
        """Give swapped modules their own classes back, in place."""
        for name in list(names):
            restore(self.module(name))
            self.state.swapped.remove(name)

    def take_out(self, name: str, layers: Iterable[str]) -> None:
        """Take an adapter out of some modules, its values of their tensors included, in place; the record stays."""
        for layer in layers:
            module = self.module(layer)
            slots = slots_of(module)
            if slots is not None:
                slots.take_out(name)
                remove_owner(module, name)
