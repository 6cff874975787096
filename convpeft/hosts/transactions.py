"""A method that may rewrite layers runs as one step: if it loses an adapter or a chain, all that it did is taken back.

What counts is what it did. It loses an adapter when an adapted layer is gone afterwards, or when it took the layer's
weight and then changed the modules around it, or returned a new module. A method that only encodes texts, prints, or fuses
what carries nothing is left alone, whatever it is called.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..convolution.nodes import is_compiling
from ..errors import HostError, shortened
from .chains import carries_chains, guard_chains
from .guards import guard, has_adapters, release
from .journal import Journal
from .model import ATTRIBUTE
from .modules import base_class, base_modules
from .rewriting import rewriting_methods
from .slots import SLOT, Slots, slots_of
from .snapshot import Snapshot, same_place
from .watching import Watched, watching

_here = threading.local()


class Watchful:
    """Stands in for a method of one module, as an attribute of it, and watches what the method does.

    Attributes:
        module, method: whose method, and its name.
    """

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    @property
    def __wrapped__(self) -> Any:
        """The method itself."""
        return getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __name__(self) -> str:
        return self.method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method; raise a HostError and take everything back if it loses an adapter or a chain."""
        if is_compiling() or getattr(_here, "busy", False):
            return self.__wrapped__(*args, **kwargs)
        carriers = {name: each for name, each in self.module.named_modules() if _carries(each)}
        if not carriers:
            return self.__wrapped__(*args, **kwargs)
        _here.busy = True
        try:
            return self._watched(carriers, args, kwargs)
        finally:
            _here.busy = False

    def _watched(self, carriers: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module
        before = Snapshot(module)
        swapped = {name: each for name, each in base_modules(module) if _matters(each)}
        layers = [each for each in carriers.values() if not _has_children(each)]
        result, error = None, None
        with watching(module, layers) as seen, _Writes(before):
            try:
                result = self.__wrapped__(*args, **kwargs)
            except Exception as raised:  # of the user's method: it goes on its way, unless an adapter was lost before
                error = raised
        lost = _lost(module, before, {**swapped, **carriers}, carriers, seen, result)
        if isinstance(error, HostError) or lost:
            before.restore()
            raise HostError(self._refusal(lost or list(carriers), any(map(has_adapters, carriers.values())))) from error
        if error is not None:
            raise error
        return result

    def _refusal(self, lost: list[str], adapted: bool) -> str:
        who, where = (
            f"{base_class(self.module).__name__}.{self.method}()",
            shortened([name or "(root)" for name in lost]),
        )
        if adapted:
            return (
                f"{who} would rewrite layers that carry adapters and lose them (at {where}). "
                "Call convpeft.merge(model) first (or convpeft.eject(model) to drop them); the model is unchanged."
            )
        return (
            f"{who} rewrites layers by their weights alone and would pass by the chains that a factored merge left (at {where}). "
            "Merge with convpeft.merge(model, form='single') instead, or call convpeft.integrations.ultralytics.fuse(model) for "
            "an ultralytics model, convpeft.integrations.mmcv.fuse_conv_bn(model) for one of mmcv's; the model is unchanged."
        )


class _Writes(TorchDispatchMode):
    """Keeps the numbers of the tensors of a snapshot before an operation writes to them."""

    def __init__(self, before: Snapshot) -> None:
        super().__init__()
        self.before = before
        self.held: dict[int, list[Tensor]] = {}
        for _, data, _ in before.tensors:
            self.held.setdefault(_place(data), []).append(data)
        self.held.pop(0, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for value in tree_flatten((args, kwargs))[0]:
                for tensor in self.held.get(_place(value), ()) if isinstance(value, Tensor) else ():
                    self.before.keep(tensor)
        return func(*args, **(kwargs or {}))


def protect(root: nn.Module, journal: Journal | None = None) -> None:
    """Let the modules above adapters and chains refuse what would lose them, and all others be as they were, in place.

    Args:
        root: of the model.
        journal: takes what is changed; None for what need not be undone.
    """
    notes = Journal() if journal is None else journal
    tree = _Tree(root)
    if ATTRIBUTE in root.__dict__ and hasattr(base_class(root), "__deepcopy__"):
        tree.adapted[id(root)] = root  # it carries the records of a class that copies itself
    inside = list(reversed(tree.carrying.values()))
    methods = dict(zip(map(id, inside), rewriting_methods(inside, tree.names), strict=True))
    for module in tree.modules.values():
        notes.keep_class(module)
        _watch(module, methods.get(id(module), set()))
        guard_chains(module)
        (guard if id(module) in tree.adapted else release)(module)


class _Tree:
    """A look at a whole model: the user's modules, each behind all that is in it.

    Attributes:
        modules: all of them, by ``id``.
        carrying: those with adapters or chains on them or below.
        adapted: those with adapters below.
        names: of all children.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules: dict[int, nn.Module] = {}
        self.carrying: dict[int, nn.Module] = {}
        self.adapted: dict[int, nn.Module] = {}
        self.names: set[str] = set()
        self._look(root)

    def _look(self, module: nn.Module) -> bool:
        """Look at a module and all below; return whether there are adapters on it or below."""
        adapted = has_adapters(module)
        carries, key = adapted or carries_chains(module), id(module)
        for name, child in module._modules.items():
            if child is None or (name == SLOT and isinstance(child, Slots)):
                continue
            self.names.add(name)
            known = id(child) in self.modules
            below = id(child) in self.adapted or has_adapters(child) if known else self._look(child)
            carries = carries or id(child) in self.carrying
            if below:
                adapted = True
                self.adapted[key] = module
        self.modules[key] = module
        if carries:
            self.carrying[key] = module
        return adapted


def unwatch(root: nn.Module) -> None:
    """Let no method of a model be watched any more, in place."""
    for module in root.modules():
        _watch(module, set())
        guard_chains(module, False)


def _watched(module: nn.Module) -> list[str]:
    return [name for name, value in module.__dict__.items() if type(value) is Watchful]


def _watch(module: nn.Module, methods: set[str]) -> None:
    """Let the named methods of a module be watched, and no others, in place."""
    held = module.__dict__
    for name in _watched(module):
        if name not in methods:
            del held[name]
    for name in methods:
        if name not in held:  # one that the user put there himself stays
            held[name] = Watchful(module, name)


def _prefixes(name: str) -> list[str]:
    """Return the names of all modules above one."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts))]


def _matters(module: nn.Module) -> bool:
    """Return whether a module has adapters, values of an adapter's own, or is a norm that is held."""
    slots = slots_of(module)
    return slots is not None and not slots.is_idle()


def _carries(module: nn.Module) -> bool:
    return has_adapters(module) or carries_chains(module)


def _has_children(module: nn.Module) -> bool:
    return any(True for name, _ in base_modules(module) if name and "." not in name) and not carries_chains(module)


def _lost(
    root: nn.Module,
    before: Snapshot,
    present: dict[str, nn.Module],
    carriers: dict[str, nn.Module],
    seen: Watched,
    result: Any,
) -> list[str]:
    """Return the names of layers that are gone, or whose weight was taken while the modules around them were changed."""
    now = dict(root.named_modules())
    gone = [name for name, module in present.items() if now.get(name) is not module or _is_bypassed(module, before)]
    known = {id(module) for module, _, _ in before.modules}
    returned = [each for each in tree_flatten(result)[0] if isinstance(each, nn.Module) and id(each) not in known]
    made = any(not any(_carries(part) for part in each.modules()) for each in returned)
    changed = {id(module) for module, own, held in before.modules if _is_changed(module, own, held)}
    rewritten = [
        name
        for name, module in carriers.items()
        if (id(module) in seen.readers or _is_moved(module, before))
        and (made or any(id(now.get(above)) in changed for above in _prefixes(name)))
    ]
    return gone + [name for name in rewritten if name not in gone]


def _is_bypassed(module: nn.Module, before: Snapshot) -> bool:
    """Return whether an adapted module has got a forward of its own, which calls no adapter."""
    return has_adapters(module) and module.__dict__.get("forward") is not before.attribute(module, "forward")


def _is_changed(module: nn.Module, own: type, held: dict[str, Any]) -> bool:
    """Return whether a module has other children, another forward or another class than before."""
    children = [(name, id(child)) for name, child in dict.items(module._modules)]
    return (
        children != [(name, id(child)) for name, child in held["_modules"][1]]
        or module.__dict__.get("forward") is not held.get("forward", (None,))[0]
        or type(module) is not own
    )


def _is_moved(module: nn.Module, before: Snapshot) -> bool:
    """Return whether one of a layer's own tensors is another, or looks at other numbers, than before."""
    places = {id(tensor): data for tensor, data, _ in before.tensors}
    return any(
        tensor is not None and not (id(tensor) in places and same_place(tensor, places[id(tensor)]))
        for tensor in module._parameters.values()
    )


def _place(tensor: Any) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
