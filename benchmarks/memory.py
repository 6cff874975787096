"""Count the memory of a step: what autograd holds for backward, and the most that the allocator held."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Ledger:
    """What is saved for backward at the moment, and the most there was; a storage counts once.

    Args:
        ignored: addresses of storages that do not count.
    """

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: Counter[int] = Counter()
        self.now = self.most = 0

    def take(self, address: int, size: int) -> None:
        """Note that one more saved tensor holds a storage."""
        self.holders[address] += 1
        if self.holders[address] == 1:
            self.now += size
            self.most = max(self.most, self.now)

    def give_back(self, address: int, size: int) -> None:
        """Note that one saved tensor fewer holds it."""
        self.holders[address] -= 1
        if not self.holders[address]:
            self.now -= size


class Held:
    """One saved tensor; autograd drops this object when backward is done with it."""

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.ledger = tensor.detach(), ledger  # an output that knew its node would keep it alive
        self.address, self.size = storage.data_ptr(), storage.nbytes()
        self.counts = self.address not in ledger.ignored
        if self.counts:
            ledger.take(self.address, self.size)

    def __del__(self) -> None:
        if self.counts:
            self.ledger.give_back(self.address, self.size)


def is_input(tensor: Tensor) -> bool:
    """Return whether the autograd node that is saving a tensor now has it as an input; one that saves its output does not.

    Nodes are numbered as they are made. The newest is the one that saves; an output belongs to it, an input to an older one.
    """
    node: Any = tensor.grad_fn
    return node is not None and node._sequence_nr() < torch._C._autograd._get_sequence_nr() - 1


def pack(tensor: Tensor, ledger: Ledger) -> Tensor | Held:
    """Return what to save for a tensor: inputs are saved as they are, as without hooks, so that layers can recompute theirs."""
    if not is_input(tensor):
        return Held(tensor, ledger)
    storage = tensor.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    if address not in ledger.ignored:
        ledger.take(address, size)
        weakref.finalize(tensor, ledger.give_back, address, size)
    return tensor


def saved_bytes(step: Callable[[], Any], modules: Iterable[nn.Module] = ()) -> int:
    """Return the most bytes that autograd held for backward at one time during a step.

    Tensors that a backward pass saves itself (recomputed blocks) count while they are held.

    Args:
        step: a forward and a backward pass.
        modules: whose parameters do not count.
    """
    ledger = Ledger({p.untyped_storage().data_ptr() for module in modules for p in module.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: pack(tensor, ledger), lambda saved: saved.tensor if isinstance(saved, Held) else saved
    ):
        step()
    return ledger.most


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the most bytes that torch's allocator held at one time during a step, beyond what it held before.

    On a GPU the caching allocator counts; on a CPU the profiler's record of every allocation and release is summed up.
    Activations, gradients and buffers are in it; what oneDNN or cuDNN allocate by themselves is not.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
