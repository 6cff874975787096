"""Several adapters in one batch: each sample goes through the adapters named for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..convolution.modes import modes_kept
from ..convolution.nodes import is_compiling
from ..errors import StateError
from ..hosts.journal import Journal
from ..hosts.model import AdaptedModel
from ..hosts.slots import Slots
from ..hosts.swap import hold
from ..hosts.threads import Block
from ..hosts.trained import train_only
from ..hosts.transaction import change
from ..hosts.unfrozen import swap_in
from .samples import Origin, Origins
from .switching import Names, enter_block, holds_norms, leave_block, names_of, owners_of


@contextmanager
def route(
    model: nn.Module, names: Sequence[str | Iterable[str] | None], *, shared: Iterable[Tensor] | None = None
) -> Iterator[nn.Module]:
    """Send each sample of a batch through its own adapters inside a ``with`` block, in evaluation and in training.

    The result is what each sample gives alone with its adapters active. Layers that no named adapter touches run once for
    the whole batch; the others once for each group of samples with the same adapters. All named adapters train. With
    gradient checkpointing call ``backward`` inside the block, for it runs layers anew.

    Which tensors have a row for each sample is told by what they were computed from, so one that is the same for all
    samples may have as many rows by chance. The samples are the input of the model with most axes.

    Args:
        model: an injected model.
        names: for each sample an adapter's name, several (their sum), or None (the bare base).
        shared: inputs of the model that are the same for all samples; needed only where an error asks for it.

    Raises:
        UnknownAdapter, AdapterConflict: as ``set_active`` does.
        StateError: if the model is routed already, or another thread runs it; during the forward pass, for a layer whose
            input has another first axis than one entry for each sample, or in another thread.

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
    router = _Router(adapted, [names_of(adapted, entry) for entry in names], shared)
    try:
        try:
            router.enter()
            with modes_kept(), router.origins:
                yield model
        finally:
            router.leave()
    finally:  # an interrupt may have come before the line above
        router.leave()


class _Router(Block):
    """Runs a routed module once for each group of samples.

    Attributes:
        groups: the samples' numbers by their adapters' names.
        names: of the group that is running, or None. A routed module inside another one sees that group only.
        origins: of all tensors that are computed inside the block.
    """

    def __init__(self, adapted: AdaptedModel, samples: list[Names], shared: Iterable[Tensor] | None) -> None:
        self.origins = Origins(adapted.root, len(samples), shared)
        self.adapted, self.count, state = adapted, len(samples), adapted.state
        self.groups: dict[Names, list[int]] = {}
        for number, entry in enumerate(samples):
            self.groups.setdefault(entry, []).append(number)
        order = [number for numbers in self.groups.values() for number in numbers]
        self.back = sorted(range(self.count), key=order.__getitem__)
        self.names: Names | None = None
        self.involved = tuple(dict.fromkeys(name for entry in samples for name in entry))
        touched = adapted.touched((*self.involved, *state.active))  # what is active now must not reach others' samples
        norms = state.norms if {holds_norms(adapted, entry) for entry in samples} != {state.held} else ()
        self.keys = {id(adapted.slots(key)): key for key in (*touched, *norms)}
        super().__init__("is inside convpeft.route(...)", [adapted.slots(key) for key in self.keys.values()])

    def enter(self) -> None:
        """Begin to route, in place, and note the block in the state; both or neither."""
        state = self.adapted.state

        def work(journal: Journal) -> None:
            journal.keep(state.__dict__)
            state.routed, state.trains_outside = self.involved, state.trained
            train_only(self.adapted, self.involved, journal)
            enter_block(state, self, journal)

        change(self.adapted.root, state, work, self.slots, since=self.adapted.since)

    def leave(self) -> None:
        """Stop to route, in place; nothing happens if the block was not entered, or was left."""
        self.origins.close()
        state = self.adapted.state
        if self not in state.blocks:
            return

        def work(journal: Journal) -> None:
            journal.keep(state.__dict__)
            train_only(self.adapted, state.trains_outside or (), journal)
            state.routed = state.trains_outside = None
            leave_block(state, self, journal)

        change(self.adapted.root, state, work, self.slots)

    def run(self, module: Any, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's output for the whole batch, or for the group that is running."""
        if not is_compiling():
            self.require_thread(module)
        if self.names is not None:
            return self._as(self.names, module, slots, args, kwargs)
        key = self.keys[id(slots)]
        flat, tree = tree_flatten((args, kwargs))
        rows = {number for number, leaf in enumerate(flat) if self._has_rows(leaf)}
        if not rows:
            shapes = [tuple(leaf.shape) for leaf in flat if isinstance(leaf, Tensor)]
            raise StateError(
                f"route was given {self.count} samples, but {key or '(root)'} sees inputs of shape {shapes}, none with one "
                "entry for each sample along its first axis: this layer cannot be routed"
            )
        if len(self.groups) == 1:
            return self._joined([self._group(next(iter(self.groups)), module, slots, args, kwargs)], key)
        splits = self._can_split([flat[number] for number in sorted(rows)], key)
        outputs = []
        for names, numbers in self.groups.items():
            if splits:
                part = [_rows(leaf, numbers) if number in rows else leaf for number, leaf in enumerate(flat)]
                own_args, own_kwargs = tree_unflatten(part, tree)
                outputs.append(self._group(names, module, slots, own_args, own_kwargs))
            else:
                outputs.append(self._of_the_whole(names, module, slots, args, kwargs))
        return self._joined(outputs, key)

    def _has_rows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.count

    def _can_split(self, leaves: list[Tensor], key: str) -> bool:
        """Return whether all these tensors with as many rows as samples belong to the samples; False: only some do.

        Raises:
            StateError: if none does, or nothing tells.
        """
        if is_compiling():
            return len(leaves) == 1
        found = [self.origins.of(leaf) for leaf in leaves]
        if Origin.SAMPLES in found:
            return all(origin is Origin.SAMPLES for origin in found)
        if all(_repeats(leaf) for leaf in leaves):
            return True
        if Origin.UNKNOWN in found:
            return len(leaves) == 1
        shapes = [tuple(leaf.shape) for leaf in leaves]
        if Origin.INPUT in found:
            raise StateError(
                f"{key or '(root)'} runs on an input of the model alone, of shape {shapes}, and nothing tells whether its rows "
                f"are the {self.count} samples. Say which inputs are the same for all samples: "
                "convpeft.route(model, names, shared=[tensor]); shared=[] if none is"
            )
        raise StateError(
            f"{key or '(root)'} runs on what is the same for all samples, of shape {shapes}, with {self.count} rows by chance: "
            "this layer cannot be routed"
        )

    def _of_the_whole(
        self, names: Names, module: Any, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the module gives for one group when it runs on all samples: right, whatever else has as many rows."""
        if module.training and not holds_norms(self.adapted, names):
            raise StateError(
                f"{self.keys[id(slots)] or '(root)'} takes tensors with {self.count} rows that do not belong to the {self.count} "
                f"samples, and norms that train with {names} would see the samples of others: this layer cannot be routed in "
                "training"
            )
        flat, tree = tree_flatten(self._group(names, module, slots, args, kwargs))
        given = {id(leaf) for leaf in tree_flatten((args, kwargs))[0]}
        numbers = self.groups[names]
        picked = [_rows(leaf, numbers) if self._has_rows(leaf) and id(leaf) not in given else leaf for leaf in flat]
        return tree_unflatten(picked, tree)

    def _group(self, names: Names, module: Any, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module gives for one group of samples; routed modules inside it see the group, too."""
        try:
            try:
                self.names, self.origins.is_paused = names, True  # all in here belongs to the group
                return self._as(names, module, slots, args, kwargs)
            finally:
                self.names, self.origins.is_paused = None, False
        finally:  # an interrupt may have come before the line above
            self.names, self.origins.is_paused = None, False

    def _as(self, names: Names, module: Any, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module gives with exactly these adapters active; it is left as it was."""
        key, before = self.keys[id(slots)], (slots.active, slots.shown, slots.held)
        owner = owners_of(self.adapted, names).get(key)
        held = holds_norms(self.adapted, names) if key in self.adapted.state.norms else slots.held
        try:
            try:
                _show(module, slots, names, owner, held)
                return module.adapted_forward(*args, **kwargs)
            finally:
                _show(module, slots, *before)
        finally:  # an interrupt may have come before the line above was through
            _show(module, slots, *before)

    def _joined(self, outputs: list[Any], key: str) -> Any:
        """Return the groups' outputs as one, in the order of the samples."""
        flats, trees = zip(*(tree_flatten(output) for output in outputs), strict=True)
        sizes = [len(numbers) for numbers in self.groups.values()]
        joined = []
        for leaves in zip(*flats, strict=True):
            if not isinstance(leaves[0], Tensor) or (len(leaves) > 1 and all(leaf is leaves[0] for leaf in leaves)):
                joined.append(leaves[0])  # a tensor that was handed through is the same for all
                continue
            if any(leaf.ndim == 0 or leaf.shape[0] != size for leaf, size in zip(leaves, sizes, strict=True)):
                raise StateError(
                    f"{key or '(root)'} returned shapes {[tuple(leaf.shape) for leaf in leaves]} for groups of {sizes} samples: "
                    "this layer cannot be routed"
                )
            joined.append(_rows(torch.cat(leaves), self.back) if len(leaves) > 1 else leaves[0])
            if not is_compiling():
                self.origins.note(joined[-1:], Origin.SAMPLES)
        return tree_unflatten(joined, trees[0])


def _show(module: Any, slots: Slots, names: Names, owner: str | None, held: bool) -> None:
    """Let a module run with these adapters, tensors and mode, in place; an interrupted call can be made again."""
    slots.activate(names)
    swap_in(module, owner)
    if slots.held != held:
        hold(module, held)


def _rows(tensor: Tensor, numbers: list[int]) -> Tensor:
    """Return these rows of a tensor, in this order."""
    return tensor[torch.tensor(numbers, device=tensor.device)]


def _repeats(tensor: Tensor) -> bool:
    """Return whether all rows of a tensor are the same, as of one that was expanded or repeated for each sample."""
    return tensor.stride(0) == 0 or bool((tensor == tensor[:1]).all())
