"""What convpeft keeps in a module: its adapters by name, and the tensors that are not shown at the moment.

It has the name of a child, ``convpeft``, in the keys of a state_dict, but is none that others meet (see ``children``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import nn

from .records import ModelState

SLOT = "convpeft"  # name of the child in the module
HOME = "_convpeft"  # name of the module's attribute that holds it
STASH = "_stash"  # name of the stored tensors in the child
KEPT = "_convpeft_buffers"  # attribute of a module that remembers its buffers
BASE = "_base"  # the owner of the module's own values
Entry = int | str | None  # the adapted entry of a module's output; None: the output itself


class Swapped:
    """Mark of a class that stands in for a module's own, ``adapted_from``."""

    adapted_from: ClassVar[type[nn.Module]]


class StoredTensors(nn.Module):
    """Parameters and buffers of one owner that are not in the module now, under the module's own names.

    Attributes:
        copied: they began as copies of the base's.
    """

    copied = False

    def forward(self) -> None:
        """Never called: a store, not a layer."""
        raise NotImplementedError


class Slots(nn.ModuleDict):
    """What one module carries: adapters by name, stored tensors, and whether its norm is held in eval mode.

    Attributes:
        active: names of the adapters that take part in the forward pass, in order.
        outputs: by adapter, the entry of the module's output that it reads and adds to.
        owners: names of the adapters that bring their own values of this module's tensors.
        shown: the owner whose tensors are in the module now, or None for the base's.
        followers: the owners whose values began as copies of the base's; each follows the base until it is trained.
        held: this norm stays in eval mode, whatever ``train()`` says.
        lean: save for backward only what a frozen layer's gradients need.
        router: runs the layer in place of its own forward: inside ``convpeft.route`` or ``using``, and during a change;
            else None. A copy has none.
        wanted_training: the mode last asked for while held.
        loading: a state_dict is being loaded into the module.
        state: the records of the model, which say what trains; None before an install is done.
        key: the module's name in the model.
        replicas: copies of the module that ``nn.DataParallel`` has made, and which wait for their copy of the slots.
        phase: of the model (``kept.Phase``): told of training.
    """

    loading = False
    state: ModelState | None = None
    key = ""
    phase: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.owners: tuple[str, ...] = ()
        self.shown: str | None = None
        self.held = False
        self.lean = False
        self.router: Any = None
        self.wanted_training = True
        self.outputs: dict[str, Entry] = {}
        self.followers: tuple[str, ...] = ()
        self.replicas: list[nn.Module] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name in self._modules:  # a wrapper around an adapter, or a replica of it
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)  # Module would refuse an attribute with the name of an adapter

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along."""
        return {**self.__dict__, "router": None}

    def adapters(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the adapters by name."""
        return ((name, module) for name, module in self._modules.items() if name != STASH)  # type: ignore[misc]

    def get(self, name: str) -> nn.Module | None:
        """Return the adapter of a name, or None."""
        return self._modules.get(name)

    def put(self, name: str, adapter: nn.Module, output: Entry = None) -> None:
        """Put an adapter in, or another in its place, in place; it is not active yet."""
        self._modules[name] = adapter  # ModuleDict refuses names such as "train"
        self.outputs[name] = output

    def replace(self, name: str, adapter: nn.Module) -> None:
        """Put another adapter in the place of one, in place: same name, same entry of the output."""
        self._modules[name] = adapter

    def take_out(self, name: str) -> None:
        """Take an adapter out, in place; nothing happens if it is not here."""
        self._modules.pop(name, None)
        self.outputs.pop(name, None)
        self.active = tuple(active for active in self.active if active != name)

    def activate(self, names: Iterable[str]) -> None:
        """Let those of the named adapters that are here take part in the forward pass, and no others, in place."""
        self.active = tuple(name for name in names if name in self._modules)

    def stored(self, owner: str) -> StoredTensors:
        """Return the store of an owner's tensors, made when first asked for."""
        if STASH not in self._modules:
            self._modules[STASH] = Slots()
        stash: Any = self._modules[STASH]
        if owner not in stash._modules:
            stash._modules[owner] = StoredTensors()
        return stash._modules[owner]

    def put_owner(self, owner: str, tensors: StoredTensors) -> None:
        """Let ``owner`` bring its own values of the module's tensors, in place; they are not shown yet."""
        self.owners = (*self.owners, owner)
        self.followers = (*self.followers, owner) if tensors.copied else self.followers
        self._modules.setdefault(STASH, Slots())._modules[owner] = tensors  # type: ignore[union-attr]

    def drop_stored(self, owner: str) -> None:
        """Forget an owner's store, in place; with the last owner the stores go altogether."""
        self.owners = tuple(name for name in self.owners if name != owner)
        self.followers = tuple(name for name in self.followers if name != owner)
        if self.owners:
            self._modules[STASH]._modules.pop(owner, None)  # type: ignore[union-attr]
        else:
            self._modules.pop(STASH, None)

    def is_idle(self) -> bool:
        """Return whether nothing is left here that the module's class must stay swapped for."""
        return not any(True for _ in self.adapters()) and not self.owners and not self.held

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.replicas = []
        if self.replicas:
            host: Any = self.replicas.pop(0)
            host.__dict__[HOME] = host._modules.slots = replica
        return replica


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's own class, behind the swap or the guard if there is one."""
    own: Any = type(module)
    return module.adapted_from if isinstance(module, Swapped) else getattr(own, "guarded_from", own)


def slots_of(module: nn.Module) -> Slots | None:
    """Return what convpeft put into the module, or None.

    The swapped class decides, not the child: others hand children on to modules of their own
    (``nn.SyncBatchNorm.convert_sync_batchnorm``).
    """
    return module.__dict__.get(HOME) if isinstance(module, Swapped) else None
