"""Several adapters in one batch: each sample goes through the adapters named for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import StateError
from ..hosts.model import AdaptedModel
from ..hosts.slots import Slots
from ..hosts.swap import hold
from ..hosts.unfrozen import swap_in
from .switching import Names, holds_norms, names_of, train_only


@contextmanager
def route(model: nn.Module, names: Sequence[str | Iterable[str] | None]) -> Iterator[nn.Module]:
    """Send each sample of a batch through its own adapters inside a ``with`` block, in evaluation and in training.

    The result is what each sample gives alone with its adapters active. Layers that no named adapter touches run once for
    the whole batch; the others once for each group of samples with the same adapters. All named adapters train. With
    gradient checkpointing call ``backward`` inside the block, for it runs layers anew.

    Args:
        model: an injected model.
        names: for each sample an adapter's name, several (their sum), or None (the bare base).

    Raises:
        UnknownAdapter, AdapterConflict: as ``set_active`` does.
        StateError: if the model is routed already, or, during the forward pass, for a layer whose input has another
            first axis than one entry for each sample.

    Example:
        >>> import torch, convpeft
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> for name in ("screw", "bottle"):
        ...     _ = convpeft.inject(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}, name=name)
        >>> with convpeft.route(model, ["screw", None, "bottle"]):
        ...     model(torch.randn(3, 3, 8, 8)).shape
        torch.Size([3, 8, 6, 6])
    """
    adapted = AdaptedModel.of(model)
    adapted.require_unrouted()
    if isinstance(names, str) or not len(names):
        raise StateError(f"route takes one entry for each sample of the batch, not {names!r}")
    samples = [names_of(adapted, entry) for entry in names]
    involved = tuple(dict.fromkeys(name for entry in samples for name in entry))
    state = adapted.state
    touched = adapted.touched((*involved, *state.active))  # what is active now must not reach the samples of others
    norms = state.norms if {holds_norms(adapted, entry) for entry in samples} != {state.held} else ()
    keys = {id(adapted.slots(key)): key for key in (*touched, *norms)}
    router = _Router(adapted, samples, keys)
    trained = state.trained
    try:
        state.routed = involved
        train_only(adapted, involved)
        for key in keys.values():
            adapted.slots(key).router = router
        yield model
    finally:
        for key in keys.values():
            adapted.slots(key).router = None
        state.routed = None
        train_only(adapted, trained)


class _Router:
    """Runs a routed module once for each group of samples.

    Attributes:
        groups: the samples' numbers by their adapters' names.
        names: of the group that is running, or None. A routed module inside another one sees that group only.
    """

    def __init__(self, adapted: AdaptedModel, samples: list[Names], keys: dict[int, str]) -> None:
        self.adapted, self.count, self.keys = adapted, len(samples), keys
        self.groups: dict[Names, list[int]] = {}
        for number, entry in enumerate(samples):
            self.groups.setdefault(entry, []).append(number)
        order = [number for numbers in self.groups.values() for number in numbers]
        self.back = sorted(range(self.count), key=order.__getitem__)
        self.names: Names | None = None

    def run(self, module: Any, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output for the whole batch, or for the group that is running."""
        if self.names is not None:
            return self._as(self.names, module, slots, args, kwargs)
        key = self.keys[id(slots)]
        flat, tree = tree_flatten((args, kwargs))
        batched = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.count for leaf in flat]
        if not any(batched):
            shapes = [tuple(leaf.shape) for leaf in flat if isinstance(leaf, Tensor)]
            raise StateError(
                f"route was given {self.count} samples, but {key or '(root)'} sees inputs of shape {shapes}, none with one "
                "entry for each sample along its first axis: this layer cannot be routed"
            )
        outputs = []
        for names, numbers in self.groups.items():
            part = [
                leaf[torch.tensor(numbers, device=leaf.device)] if mine else leaf
                for leaf, mine in zip(flat, batched, strict=True)
            ]
            own_args, own_kwargs = tree_unflatten(part, tree)
            self.names = names
            try:
                outputs.append(self._as(names, module, slots, own_args, own_kwargs))
            finally:
                self.names = None
        return self._joined(outputs, key)

    def _as(self, names: Names, module: Any, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module gives with exactly these adapters active; it is left as it was."""
        key, shown, active, held = self.keys[id(slots)], slots.shown, slots.active, slots.held
        state = self.adapted.state
        owner = next((name for name in names if key in state.adapters[name].owned), None)
        is_norm = key in state.norms
        try:
            slots.activate(names)
            swap_in(module, owner)
            if is_norm:
                hold(module, holds_norms(self.adapted, names))
            return module.adapted_forward(*args, **kwargs)
        finally:
            slots.activate(active)
            swap_in(module, shown)
            if is_norm:
                hold(module, held)

    def _joined(self, outputs: list[Any], key: str) -> Any:
        """Return the groups' outputs as one, in the order of the samples."""
        flats, trees = zip(*(tree_flatten(output) for output in outputs), strict=True)
        sizes = [len(numbers) for numbers in self.groups.values()]
        joined = []
        for leaves in zip(*flats, strict=True):
            if not isinstance(leaves[0], Tensor):
                joined.append(leaves[0])
                continue
            if any(leaf.ndim == 0 or leaf.shape[0] != size for leaf, size in zip(leaves, sizes, strict=True)):
                raise StateError(
                    f"{key or '(root)'} returned shapes {[tuple(leaf.shape) for leaf in leaves]} for groups of {sizes} samples: "
                    "this layer cannot be routed"
                )
            whole = torch.cat(leaves)
            joined.append(whole[torch.tensor(self.back, device=whole.device)])
        return tree_unflatten(joined, trees[0])
