"""Records of what is injected where: plain data in an attribute of the root module, so that copies carry them along."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

Names = tuple[str, ...]
ATTRIBUTE = "_convpeft_state"  # of the root, where its ModelState is


@dataclass
class LayerRecord:
    """One adapter on one layer, as plain data.

    Attributes:
        kind, place, options: what makes the adapter.
        geometry: of its site, as ``ConvGeometry.to_dict`` gives it.
        output: the adapted entry of the module's output, or None.
        lr_mult: relative learning rate.
        rule: number of the rule that asked for it.
        up_mult: relative learning rate of its last weights; None: as ``param_groups`` says.
    """

    kind: str
    place: str
    options: dict[str, Any]
    geometry: dict[str, Any]
    output: int | str | None = None
    lr_mult: float = 1.0
    rule: int = 0
    up_mult: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for an adapter file; ``up_mult`` only where it is set."""
        return {key: value for key, value in self.__dict__.items() if key != "up_mult" or value is not None}


@dataclass
class AdapterRecord:
    """One adapter of the model, over all its layers.

    Attributes:
        spec: the spec it came from, as plain data.
        layers: by module name.
        owned: names of modules whose tensors the adapter brings its own values of, with their relative learning rate.
        norm: the norm policy while it is active.
        holds: ``norm: adapt`` holds its statistics now, towards the end of a training.
    """

    spec: dict[str, Any]
    layers: dict[str, LayerRecord]
    owned: dict[str, float]
    norm: str = "frozen"
    holds: bool = False


@dataclass
class Phase:
    """What happened to a model since adapters were last switched; its modules share one.

    Attributes:
        active: names of the adapters that were made active then.
        trained: some module was in training mode, or an optimizer stepped: buffers that are others now were moved by training.
        own: some adapter has buffers of its own.
        stamp: of the active adapters' weights then, see ``buffers.weights_stamp``.
    """

    active: Names = ()
    trained: bool = False
    own: bool = False
    stamp: tuple[int, int] = (0, 0)


@dataclass
class ModelState:
    """All adapters of one model, and what has to be given back when they go.

    Attributes:
        adapters: by name, in the order of arrival.
        active: names of the active ones.
        trained: names of those whose parameters require gradients: the active ones, outside of ``using``.
        requires_grad: what each of the user's parameters was set to before the first injection.
        swapped: names of all modules whose class is swapped.
        norms: names of all BatchNorm-like modules.
        held: whether these are held in eval mode now; None before the first switch.
        routed: names of the adapters that samples go through inside ``route``; else None.
        phase: whether anything trained since the last switch.
        blocks: the ``with`` blocks that the model is in, the innermost last. A copy is in none.
        journal: of the change that is being made; else None, and then not an attribute of the object.
        changes: how many have been made; tells one thread that another came before it.
        trains_outside: the names that train again after ``route``, inside it and in copies made there; else None.
        in_training: names of the swapped modules that were last asked to be in training mode.
    """

    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    requires_grad: dict[str, bool] = field(default_factory=dict)
    swapped: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    held: bool | None = None
    routed: tuple[str, ...] | None = None
    phase: Phase = field(default_factory=Phase)
    blocks: tuple[Any, ...] = ()
    trains_outside: tuple[str, ...] | None = None
    in_training: set[str] = field(default_factory=set)
    changes: int = 0
    journal: ClassVar[Any] = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: it is outside of every block."""
        kept = {name: value for name, value in self.__dict__.items() if name != "journal"}
        return {**kept, "routed": None, "blocks": ()}

    @property
    def resting(self) -> bool:
        """Whether a block of ``using`` is open: inside one, nothing has to train."""
        return any(block.rests for block in self.blocks)

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the adapters that take part in a forward pass now."""
        return self.active if self.routed is None else self.routed
