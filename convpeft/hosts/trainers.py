"""Refuse a trainer that builds a model of its own and would train that, without adapters: ultralytics' ``YOLO.train``.

``YOLO.train()`` makes a new model from its description and copies the weights whose names and shapes fit. The adapted
model is not asked at any point, so nothing in it could refuse: ``train`` and ``tune`` of ultralytics' ``Model`` look first.
ultralytics is never imported here: it is looked up among the modules that the user's program has imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import wraps
from typing import Any

from torch import nn

from ..errors import HostError
from .slots import Swapped
from .wrappers import inside

_FRAMEWORK = "ultralytics"
_OWNER = ("ultralytics.engine.model", "Model")
_VERIFIED_ON = "on_pretrain_routine_end"  # ultralytics' event when the trainer has its model


def guard_trainers(kinds: Iterable[type]) -> None:
    """Let ultralytics' ``Model`` refuse to train without the adapters of its module, if one of ``kinds`` is ultralytics'.

    The two methods are replaced once for the program; for a module without adapters they do what they did.
    """
    if not any(base.__module__.split(".")[0] == _FRAMEWORK for kind in set(kinds) for base in kind.__mro__):
        return
    owner = getattr(sys.modules.get(_OWNER[0]), _OWNER[1], None)
    for method in ("train", "tune"):
        original = vars(owner).get(method) if owner is not None else None
        if callable(original) and not hasattr(original, "convpeft_guards"):
            setattr(owner, method, _guarded(original, method))


def _guarded(original: Any, method: str) -> Any:
    """Return a method of ultralytics' ``Model`` that refuses what would leave the adapters behind."""

    @wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_adapted(getattr(self, "model", None)):
            return original(self, *args, **kwargs)
        trainer = kwargs.get("trainer", args[0] if args else None)
        if method != "train" or trainer is None:
            raise _refusal(self, f"{type(self).__name__}.{method}()")
        self.add_callback(_VERIFIED_ON, _verify)
        try:
            return original(self, *args, **kwargs)
        finally:
            left = self.callbacks.get(_VERIFIED_ON, [])
            if _verify in left:
                left.remove(_verify)

    guarded.convpeft_guards = True  # type: ignore[attr-defined]
    return guarded


def _verify(trainer: Any) -> None:
    """Raise if a trainer of the user's is about to train a model without adapters."""
    if not _is_adapted(trainer.model):
        raise _refusal(trainer, f"{type(trainer).__name__}.get_model()")


def _refusal(owner: Any, call: str) -> HostError:
    return HostError(
        f"{call} builds a new model, which has none of the adapters that are in this {type(owner).__name__}'s, and that one "
        "would be trained. Pass trainer=convpeft.integrations.ultralytics.trainer(spec), which injects into the model that is "
        "trained, or a trainer class whose get_model() returns the adapted model and whose final_eval() does not fuse it; to "
        "train the base, take the adapters out first: convpeft.eject(yolo.model). The model is unchanged."
    )


def _is_adapted(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, Swapped) for module in inside(model).modules())
