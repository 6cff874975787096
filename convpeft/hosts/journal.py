"""What a change of a model displaces, noted before it is displaced, so that the change happens whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .slots import HOME, STASH, Slots, slots_of

_GONE = object()  # an attribute that was not there
_REGISTRIES = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, list, set)))
_SWITCHED = (
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    HOME,
)  # of a user's module, what injecting and switching write


class Journal:
    """Notes of what was there before each write; ``undo`` puts all of it back.

    Every tensor that a change moves is held here until the change is over, so none can be lost on the way. Undoing only
    sets things to what they were, from the last note to the first, so an interrupted ``undo`` is simply called again.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[Callable[[Any, Any], None], Any, Any]] = []

    def keep(self, owner: Any, *names: str) -> None:
        """Note attributes of an object as they are now (no names: all of them), with what is in its containers."""
        space = owner.__dict__
        found = {name: space.get(name, _GONE) for name in names} if names else dict(space)
        self._notes.append((_put_back if names else _refill, space, found))
        is_users = isinstance(owner, nn.Module) and not isinstance(owner, Slots)
        for name, value in found.items():
            if isinstance(value, (dict, list, set)) and (name in _REGISTRIES or not is_users):
                contents = dict(value) if isinstance(value, dict) else list(value)
                self._notes.append((_refill, value, contents))

    def keep_module(self, module: nn.Module, *, whole: bool = False) -> None:
        """Note all of a module that convpeft writes to (``whole``: all there is), and all that convpeft put into it."""
        if isinstance(module, torch.jit.ScriptModule):  # keeps nothing in Python, and is never written to
            return
        self._notes.append((_set_class, module, type(module)))
        self.keep(module, *(() if whole else _SWITCHED))
        slots = slots_of(module)
        if slots is None:
            return
        self.keep(slots)
        self._keep_stores(slots)

    def keep_guards(self, module: nn.Module, names: Iterable[str]) -> None:
        """Note a module's class and some attributes of its own."""
        if not isinstance(module, torch.jit.ScriptModule):
            self._notes.append((_set_class, module, type(module)))
            self.keep(module, *names)

    def keep_tensors(self, module: nn.Module, slots: Slots) -> None:
        """Note whose tensors a module shows, and where all of its owners' tensors are."""
        self.keep(module, "_parameters", "_buffers")
        self.keep(slots, "shown", "_modules")
        self._keep_stores(slots)

    def _keep_stores(self, slots: Slots) -> None:
        stash = slots._modules.get(STASH)
        for store in () if stash is None else (stash, *stash._modules.values()):
            self.keep(store, "_parameters", "_buffers", "_modules")

    def require_grad(self, tensor: Tensor, flag: bool) -> None:
        """Let a tensor require a gradient or not, in place; one that cannot be told so is left alone."""
        can_be_told = tensor.is_leaf and (not flag or tensor.is_floating_point() or tensor.is_complex())
        if can_be_told and tensor.requires_grad != flag:
            self.keep_flag(tensor)
            _set_flag(tensor, flag)

    def keep_flag(self, tensor: Tensor) -> None:
        """Note whether a tensor requires a gradient."""
        if tensor.is_leaf:
            self._notes.append((_set_flag, tensor, tensor.requires_grad))

    def undo(self) -> None:
        """Put back all that was noted, in place."""
        for put_back, target, value in reversed(self._notes):
            put_back(target, value)


def _put_back(space: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in found.items():
        if value is not _GONE:
            space[name] = value
        else:
            space.pop(name, None)


def _refill(container: Any, contents: Any) -> None:
    """Give a container exactly these contents, a dict in their order."""
    if isinstance(container, list):
        container[:] = contents
        return
    for extra in [entry for entry in container if entry not in contents]:
        container.pop(extra) if isinstance(container, dict) else container.discard(extra)
    if isinstance(container, dict) and list(container) != list(contents)[: len(container)]:
        container.clear()
    container.update(contents)


def _set_class(module: nn.Module, own: type) -> None:
    if type(module) is not own:
        object.__setattr__(module, "__class__", own)


def _set_flag(tensor: Tensor, flag: bool) -> None:
    if flag and tensor.is_inference():  # torch allows it inside only
        with torch.inference_mode():
            tensor.requires_grad = flag
    else:
        tensor.requires_grad = flag


def all_modules(root: nn.Module) -> dict[int, nn.Module]:
    """Return every module below and with ``root``, ours too, by ``id``, without calling anything a user may have overridden."""
    found: dict[int, nn.Module] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in module._modules.values() if child is not None]
            slots = slots_of(module)
            waiting += [] if slots is None else [slots]
    return found


def all_parameters(root: nn.Module) -> list[nn.Parameter]:
    """Return every parameter below ``root``, each once, without calling anything a user may have overridden."""
    found = {
        id(parameter): parameter
        for module in all_modules(root).values()
        for parameter in module._parameters.values()
        if parameter is not None
    }
    return list(found.values())


def named_parameters(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter with each of its names, without calling anything a user may have overridden."""
    for name, parameter in module_items(root._parameters):
        yield prefix + name, parameter
    for name, child in module_items(root._modules):
        yield from named_parameters(child, f"{prefix}{name}.")


def module_items(entries: Any) -> list[tuple[str, Any]]:
    """Return the entries of a module's registry that are set; a TorchScript module's is no dict."""
    return [(name, value) for name, value in entries.items() if value is not None]
