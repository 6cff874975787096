"""Several adapters in one batch: each sample goes through the adapters named for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import hosting
from .errors import StateError
from .injection import names_of, switchable, train_only
from .state import ModelState, module_at, require_state, slots_at

Names = tuple[str, ...]


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
    root, state = require_state(model)
    switchable(state)
    if isinstance(names, str) or not len(names):
        raise StateError(f"route takes one entry for each sample of the batch, not {names!r}")
    samples = [names_of(state, entry) for entry in names]
    involved = tuple(dict.fromkeys(name for entry in samples for name in entry))
    router = _Router(state, samples)
    touched = {key for name in involved for key in (*state.adapters[name].layers, *state.adapters[name].owned)}
    for name in state.active:  # its values and adapters must not reach the samples of others
        touched.update(state.adapters[name].layers, state.adapters[name].owned)
    found = {key: slots_at(root, key) for key in (*touched, *(state.norms if router.lets_go(state) else ()))}
    trained = state.trained
    router.keys = {id(slots): key for key, slots in found.items()}
    router.modules = {key: module_at(root, key) for key in found}
    try:
        state.routed = involved
        train_only(root, state, involved)
        for slots in found.values():
            slots.router = router
        yield model
    finally:
        for slots in found.values():
            slots.router = None
        state.routed = None
        train_only(root, state, trained)


class _Router:
    """Runs a routed module once for each group of samples.

    Attributes:
        groups: the samples' numbers by their adapters' names.
        names: of the group that is running, or None; a module inside another that was dealt out already sees only it.
    """

    def __init__(self, state: ModelState, samples: list[Names]) -> None:
        self.state, self.count = state, len(samples)
        self.groups: dict[Names, list[int]] = {}
        for number, entry in enumerate(samples):
            self.groups.setdefault(entry, []).append(number)
        order = [number for numbers in self.groups.values() for number in numbers]
        self.back = sorted(range(self.count), key=order.__getitem__)
        self.names: Names | None = None
        self.keys: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}

    def lets_go(self, state: ModelState) -> bool:
        """Return whether norms are held for some samples and not for others, or not as they are now."""
        wanted = {self._held(entry) for entry in self.groups}
        return wanted != {state.held}

    def _held(self, names: Names) -> bool:
        return not any(self.state.adapters[name].norm == "adapt" for name in names)

    def run(self, module: Any, slots: hosting.Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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

    def _as(
        self, names: Names, module: Any, slots: hosting.Slots, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the module gives with exactly these adapters active; it is left as it was."""
        key, shown, active, held = self.keys[id(slots)], slots.shown, slots.active, slots.held
        owner = next((name for name in names if key in self.state.adapters[name].owned), None)
        is_norm = key in self.state.norms
        try:
            slots.active = tuple(name for name in names if name in slots._modules)
            hosting.show(module, owner)
            if is_norm:
                hosting.hold(module, self._held(names))
            return module.adapted_forward(*args, **kwargs)
        finally:
            slots.active = active
            hosting.show(module, shown)
            if is_norm:
                hosting.hold(module, held)

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
