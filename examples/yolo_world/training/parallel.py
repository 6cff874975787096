"""One training over several processes: the loss that adds up to the one-process loss, and DDP or FSDP2 around it."""

from __future__ import annotations

import datetime
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.images import Batch

KINDS = ("ddp", "fsdp")


class ParallelError(RuntimeError):
    """A training that several processes cannot share here: says why, and what to do."""


def make_accelerator(device: str, precision: str) -> Accelerator:
    """Return the accelerator that all trainings of a run share.

    Args:
        device: ``cpu``, or ``auto`` for what accelerate finds.
        precision: ``no``, ``bf16`` or ``fp16``.

    Raises:
        RuntimeError: if several processes were launched and accelerate does not join them: each would train alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.cuda.is_available():
        device = "cpu"  # accelerate joins processes on the CPU only if it is told to use it
    waiting = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # others wait while the first one evaluates
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision, kwargs_handlers=[waiting])
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes} on {accelerator.device}"
        )
    return accelerator


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is FSDP2's, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; where it is sharded, all processes have to ask together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same in all processes, into one that may be sharded, in place."""
    if not is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    shards = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(shards)


def sharded_like(value: Any, target: Tensor) -> Tensor:
    """Return a whole tensor sharded as ``target`` is; as it is where ``target`` is whole or of another shape."""
    if not is_sharded(target) or value.shape != target.shape:
        return value
    placed = torch.empty_like(target, dtype=value.dtype)
    put(placed, value)
    return placed


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; not finite if it is not finite in any of them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        return values / dist.get_world_size()
    return values


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested dictionaries, lists and tuples that have a gradient."""
    if isinstance(nested, Tensor):
        if nested.requires_grad:
            yield nested
    elif isinstance(nested, dict):
        yield from tensors_in(list(nested.values()))
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from tensors_in(value)


class BatchLoss(nn.Module):
    """The loss per image of a global batch, as each process has to see it.

    ultralytics' loss divides the sum over a batch by the sum ``t`` of its target scores, at least 1. Averaging such
    losses over processes is not the loss of the whole batch: a process with few objects would count as much as one
    with many. Here each process scales its loss by ``max(t, 1) * processes / max(sum of all t, 1)``, so that the mean
    over processes, which DDP and FSDP take of the gradients, is exactly the whole batch's. Both ``t`` come
    from the loss's own target assigner, which treats each image by itself.

    Each output and trainable parameter is added with weight 0, so that every process has a gradient for each of
    them, also with no object in its part or an expert that got no image; DDP needs no ``find_unused_parameters``.

    Args:
        model: ultralytics detector.
        processes: how many take part.
        extra_loss: added to the loss, such as ``convpeft.auxiliary_loss``; averaged over processes.
    """

    def __init__(
        self, model: nn.Module, processes: int = 1, extra_loss: Callable[[nn.Module], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.model, self.processes, self.extra_loss = model, processes, extra_loss
        self.assigned: Tensor | None = None

    def criterion(self) -> Any:
        """Return the model's loss, made anew where changing the classes has dropped it.

        Raises:
            ParallelError: if several processes take part and the loss has no target assigner to read ``t`` from.
        """
        if self.model.criterion is None:
            self.model.criterion = self.model.init_criterion()
            assigner = getattr(self.model.criterion, "assigner", None)
            if self.processes > 1 and not isinstance(assigner, nn.Module):
                raise ParallelError(
                    f"{type(self.model.criterion).__name__} has no 'assigner', whose target scores say how its loss is divided; "
                    "train this model in one process."
                )
            if self.processes > 1:
                assigner.register_forward_hook(self.note)  # type: ignore[union-attr]
        return self.model.criterion

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the sum of the target scores that the assigner gave."""
        self.assigned = output[2].sum()

    def share(self) -> Tensor:
        """Return what this process's loss is multiplied by; all processes have to ask together."""
        assert self.assigned is not None
        total = self.assigned.detach().clone()
        dist.all_reduce(total)
        return self.assigned.clamp(min=1) * self.processes / total.clamp(min=1)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of this process's part of a global batch, a scalar."""
        predictions = self.model(batch["img"], txt_feats=batch["txt_feats"])
        losses, _ = self.criterion()(predictions, batch)
        loss = losses.sum() / len(batch["img"])
        if self.processes > 1:
            loss = loss * self.share()
            trained = [p for p in self.model.parameters() if p.requires_grad and not is_sharded(p)]
            loss = loss + sum((tensor * 0).sum() for tensor in (*tensors_in(predictions), *trained))
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self.model)
        return loss


def shard(model: nn.Module) -> nn.Module:
    """Shard an ultralytics model over all processes with FSDP2, layer by layer, in place, and return it.

    Frozen and trainable parameters are sharded alike; each layer's are gathered while it runs. Scalars cannot be sharded
    and stay whole in each process (``mean_of_whole_gradients`` sees to theirs). Take parameters for an optimizer
    only afterwards: they are other objects.

    Raises:
        ParallelError: if this torch's FSDP2 is missing or cannot leave scalars out.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        fully_shard = None
    if fully_shard is None or "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ParallelError(
            f"--parallel fsdp needs torch's fully_shard with ignored_params (2.7 or newer); this is {torch.__version__}."
        )
    # The loss reads the outputs and changes none of them in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for layer in model.model:
        if any(parameter.ndim for parameter in layer.parameters()):
            fully_shard(layer, mesh=mesh, ignored_params=scalars)
    return fully_shard(model, mesh=mesh, ignored_params=scalars)


def mean_of_whole_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average over processes the gradients of those parameters that a sharded model keeps whole, in place."""
    if not any(map(is_sharded, parameters)):
        return
    for parameter in parameters:
        if not is_sharded(parameter):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = mean_over_processes(gradient)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients, in place, so that their norm is at most ``limit``, and return the norm they had.

    torch's own function does it, except where sharded and whole parameters are mixed, which it refuses.
    """
    sharded = [p.grad for p in parameters if p.grad is not None and is_sharded(p)]
    if not sharded:
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    whole = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    norms = [float(full(torch.nn.utils.get_total_norm(sharded)))]
    norms += [float(torch.nn.utils.get_total_norm(whole))] if whole else []
    norm = math.hypot(*norms)
    share = limit / (norm + 1e-6)
    if share < 1:
        for gradient in (*sharded, *whole):
            gradient.mul_(share)
    return norm


def wrap(loss: BatchLoss, kind: str, device: torch.device) -> nn.Module:
    """Return what is called for the loss of a batch: DDP around it, or itself where the model is sharded or alone.

    BatchNorm that is held needs nothing from the others. Where statistics move (``norm: adapt``) each process has its
    own, and the first one's are sent to the others before each batch.
    """
    if loss.processes == 1 or kind == "fsdp":
        return loss
    moving = any(module.training and isinstance(module, nn.modules.batchnorm._BatchNorm) for module in loss.modules())
    devices = [device] if device.type == "cuda" else None
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    named = {"forward_sync_buffers" if newer else "broadcast_buffers": moving}
    return DistributedDataParallel(loss, device_ids=devices, **named)


def unsynchronised(wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return a context for one of several accumulated batches; DDP exchanges gradients only in the last."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return nullcontext()
