"""What a change of a model displaces, noted before it is displaced, so that the change happens whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .slots import STASH, Slots, slots_of
from .wrappers import inside

_REGISTRIES = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, list, set)))


class Journal:
    """Notes of what was there before each write; ``undo`` puts all of it back.

    Every tensor that a change moves is held here until the change is over, so none can be lost on the way. Undoing only
    sets things to what they were, from the last note to the first, so an interrupted ``undo`` is simply called again.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[Callable[[Any, Any], None], Any, Any]] = []

    def keep(self, *containers: Any) -> None:
        """Note what is in dicts, lists and sets now; an object's attributes are in its ``__dict__``."""
        self._notes += [(_refill, container, container.copy()) for container in containers]

    def keep_module(self, module: nn.Module, *, whole: bool = False) -> None:
        """Note all of a module that convpeft writes to (``whole``: all there is), and all that convpeft put into it."""
        if isinstance(module, torch.jit.ScriptModule):  # keeps nothing in Python, and is never written to
            return
        self._notes.append((_set_class, module, type(module)))
        self.keep(module.__dict__, module._modules)
        if whole:
            self.keep(*[module.__dict__[name] for name in _REGISTRIES if name in module.__dict__])
        self.keep_tensors(module, slots_of(module))

    def keep_tensors(self, module: nn.Module, slots: Slots | None) -> None:
        """Note whose tensors a module shows, and where all of its owners' tensors are."""
        self.keep(module._parameters, module._buffers)
        if slots is None:
            return
        self.keep(slots.__dict__, slots._modules, slots.outputs)
        stash = slots._modules.get(STASH)
        if stash is not None:
            self.keep(stash._modules)
            for store in stash._modules.values():
                self.keep(store._parameters, store._buffers)  # type: ignore[union-attr]

    def keep_class(self, module: nn.Module) -> None:
        """Note a module's class and attributes."""
        if not isinstance(module, torch.jit.ScriptModule):
            self._notes.append((_set_class, module, type(module)))
            self.keep(module.__dict__)

    def require_grad(self, tensor: Tensor, flag: bool) -> None:
        """Let a tensor require a gradient or not, in place; one that cannot be told so is left alone."""
        if tensor.requires_grad == flag or not tensor.is_leaf:
            return
        if not flag or tensor.is_floating_point() or tensor.is_complex():
            self._notes.append((_set_flag, tensor, not flag))
            _set_flag(tensor, flag)

    def keep_flag(self, tensor: Tensor) -> None:
        """Note whether a tensor requires a gradient."""
        if tensor.is_leaf:
            self._notes.append((_set_flag, tensor, tensor.requires_grad))

    def undo(self) -> None:
        """Put back all that was noted, in place."""
        for put_back, target, value in reversed(self._notes):
            put_back(target, value)


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
    """Yield every parameter with each of its names, those of wrappers left out, without calling anything a user may have overridden."""
    for name, parameter in module_items(root._parameters):
        yield prefix + name, parameter
    for name, child in module_items(root._modules):
        yield from named_parameters(inside(child), f"{prefix}{name}.")


def module_items(entries: Any) -> list[tuple[str, Any]]:
    """Return the entries of a module's registry that are set; a TorchScript module's is no dict."""
    return [(name, value) for name, value in entries.items() if value is not None]
