"""Steps of optimizers, looked at before they are made: one that cannot train the active adapters is refused in words.

An optimizer takes stock of the parameters when it is built. Adapters that were injected, loaded or made active later are
not in it: the loss is computed, the backward pass runs, and nothing of them ever changes. Torch calls one function before
each step of any optimizer; that is the only moment at which a trainer, whatever it is, can be told.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from ..convolution.nodes import is_compiling
from ..errors import StateError, shortened
from .modules import base_class, base_modules
from .records import ATTRIBUTE, ModelState
from .slots import slots_of

_watched: dict[int, ref[nn.Module]] = {}  # by id: a module's class may have an __eq__ and no hash
_seen: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
_registered: list[Any] = []
REMEDY = (
    "Build the optimizer after convpeft.inject, load_adapter or set_active: "
    "torch.optim.AdamW(convpeft.param_groups(model, lr=...)). Where a trainer builds it, inject before the trainer gets the "
    "model; convpeft.audit(model, optimizer) shows what each group holds"
)


def watch_steps(root: nn.Module) -> None:
    """Have the steps of every optimizer that holds parameters of this model looked at from now on."""
    key = id(root)
    _watched[key] = ref(root, lambda _: _watched.pop(key, None))
    if not _registered:
        _registered.append(torch_optimizer.register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Look at an optimizer once for each state of the adapted models and of its groups; called by torch before a step."""
    if is_compiling() or not _watched:
        return
    roots = [root for each in list(_watched.values()) if (root := each()) is not None]
    found = [(root, state) for root in roots if (state := root.__dict__.get(ATTRIBUTE)) is not None]
    groups = optimizer.param_groups
    stamp = (*(number for _, state in found for number in (id(state), state.changes)), len(groups))
    if _seen.get(optimizer) == stamp:
        return
    held = {id(parameter): parameter for group in groups for parameter in group["params"]}
    for root, state in found:
        _look(optimizer, held, root, state)
    _seen[optimizer] = stamp


def _look(optimizer: Any, held: dict[int, nn.Parameter], root: nn.Module, state: ModelState) -> None:
    """Raise if an optimizer holds a model's parameters and none that trains; warn if it changes the frozen base."""
    own, base = parameters_of(root, state)
    theirs = held.keys() & {id(parameter) for parameter in root.parameters()}
    others = any(parameter.grad is not None for key, parameter in held.items() if key not in theirs)
    if not theirs or state.resting or (others and not state.trained):
        return
    thawed = [base[key] for key in base.keys() & held.keys() if held[key].requires_grad and held[key].grad is not None]
    if thawed:
        warnings.warn(
            f"{type(optimizer).__name__} changes {len(thawed)} parameters of the base of this {base_class(root).__name__} that "
            f"convpeft had frozen ({shortened(sorted(thawed), 3)}): somebody set requires_grad=True after inject(), and the adapter "
            "would belong to a base that nobody keeps. Name them in the spec (unfreeze: ...), so that the adapter has values of "
            "its own, or freeze them again with convpeft.set_active(model, name)",
            stacklevel=3,
        )
    if not own.keys() & held.keys() and not thawed and not _another_holds(optimizer, own):
        names = ", ".join(map(repr, state.trained)) or "none"
        raise StateError(
            f"this step of {type(optimizer).__name__} would train nothing: it holds {len(theirs)} parameters of this "
            f"{base_class(root).__name__}, and not one of the {len(own)} that are to train (active adapters: {names}). "
            f"{REMEDY}; the model is unchanged."
        )


def parameters_of(root: nn.Module, state: ModelState) -> tuple[dict[int, str], dict[int, str]]:
    """Return the names of what is to train and of the base's own parameters, by ``id``.

    What is to train are the active adapters' parameters and their values of what they unfroze.
    """
    own: dict[int, str] = {}
    base: dict[int, str] = {}
    for name, module in base_modules(root):
        slots = slots_of(module)
        shown = None if slots is None else slots.shown
        place = own if shown in state.trained else base
        if shown is None or shown in state.trained:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    place[id(parameter)] = f"{name}.{key}".lstrip(".")
        for adapter in () if slots is None else state.trained:
            child = slots._modules.get(adapter)  # type: ignore[union-attr]
            for key, parameter in () if child is None else child.named_parameters():
                own[id(parameter)] = f"{name}.convpeft.{adapter}.{key}".lstrip(".")
    return own, {key: name for key, name in base.items() if key not in own}


def _another_holds(optimizer: Any, own: dict[int, str]) -> bool:
    """Return whether another optimizer of this process holds something that is to train, as in loops with several."""
    return any(
        id(parameter) in own
        for other in _optimizers()
        if other is not optimizer
        for group in other.__dict__.get("param_groups", ())
        for parameter in group["params"]
    )


def _optimizers() -> Iterator[Any]:
    return (each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer))
