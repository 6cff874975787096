"""What flows through adapters on some batches: the main directions of their inputs, and the gradients of their layers' kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..convolution.geometry import ConvGeometry
from ..errors import StateError
from ..hosts.uncompiled import uncompiled
from ..hosts.wrappers import inside
from .calibration import evaluating, with_bar

Loss = Callable[[Any, Any], Tensor]


def kernel_gradient(geometry: ConvGeometry, x: Tensor, gradient: Tensor) -> Tensor:
    """Return what the kernel of a convolution would have as gradient, float32, of shape ``geometry.weight_shape()``.

    Args:
        geometry: of the convolution.
        x: its input.
        gradient: of its output.
    """
    with torch.enable_grad():
        kernel = torch.zeros(geometry.weight_shape(), dtype=x.dtype, device=x.device, requires_grad=True)
        (found,) = torch.autograd.grad(geometry.convolve(x.detach(), kernel), kernel, gradient)
    return found.float()


class InputSketch:
    """Sketches the second moments C of a layer's patches: ``Omega C`` for random rows Omega, summed over the batches.

    ``Omega C`` is the kernel gradient of a convolution with kernel Omega for its own output as the output's gradient. Its
    right singular vectors are the main directions of the patches (randomised subspace iteration: Halko et al.,
    arXiv:0909.4061, algorithm 4.3 with q = 1/2).

    Args:
        geometry: of the weights that read the input.
        rows: of Omega, for each group.
        generator: of its random numbers.
    """

    def __init__(self, geometry: ConvGeometry, rows: int, generator: torch.Generator) -> None:
        self.geometry = geometry.with_channels(geometry.in_channels, rows * geometry.groups)
        self.omega = torch.randn(self.geometry.weight_shape(), generator=generator)
        self.total = torch.zeros_like(self.omega)

    def see(self, adapter: nn.Module, args: Any) -> None:
        """Add a batch; a forward pre-hook of an adapter."""
        x = args[0].detach()
        omega = self.omega.to(x.device, x.dtype)
        self.total += kernel_gradient(self.geometry, x, self.geometry.convolve(x, omega)).cpu() / x.numel()


class KernelGradients:
    """Collects the gradient of a layer's whole kernel at the place of an adapter beside it, as sums over halves of the batches.

    Attributes:
        halves: the gradients of the batches with an even and with an odd number.
    """

    def __init__(self, geometry: ConvGeometry) -> None:
        self.geometry = geometry
        self.halves: list[Tensor | float] = [0.0, 0.0]
        self.half = 0
        self.pixels = 0

    def see(self, adapter: nn.Module, args: Any, output: Tensor) -> None:
        """Note the input, and take the output's gradient when it comes; a forward hook of an adapter."""
        if not output.requires_grad:
            return
        x, half = args[0].detach(), self.half
        self.pixels = max(self.pixels, output.numel() // output.shape[-1 if self.geometry.linear else 1])

        def take(gradient: Tensor) -> None:
            self.halves[half] = self.halves[half] + kernel_gradient(self.geometry, x, gradient)

        output.register_hook(take)

    @property
    def whole(self) -> Tensor | None:
        """The gradient over all batches, or None if none came."""
        total = self.halves[0] + self.halves[1]
        return total if isinstance(total, Tensor) else None


def run_losses(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    seen: Sequence[KernelGradients],
    *,
    title: str,
    progress: bool,
    after: Callable[[int], None] | None = None,
) -> int:
    """Run batches forward and backward for the hooks, and return how many; no parameter's ``grad`` is left changed.

    All modules but norms are in training mode, as the losses of detectors want it; the modes are as before afterwards.

    Args:
        model: to run.
        batches: any iterable.
        loss: called as ``loss(model, batch)``.
        seen: are told which half a batch belongs to.
        title: of the bar.
        progress: show it.
        after: called with the half after each backward, while the parameters have this batch's gradients.

    Raises:
        StateError: if there is no batch, or the loss is no finite scalar that depends on what trains.
    """
    plain, count = inside(model), 0
    kept = [(parameter, parameter.grad) for parameter in plain.parameters() if parameter.requires_grad]
    with evaluating(plain, training=True), uncompiled(), torch.enable_grad():
        try:
            for batch in with_bar(batches, progress, title):
                for each in seen:
                    each.half = count % 2
                for parameter, _ in kept:
                    parameter.grad = None
                value = loss(plain, batch)
                _check(value)
                value.backward()
                if after is not None:
                    after(count % 2)
                count += 1
        finally:
            for parameter, grad in kept:
                parameter.grad = grad
    if not count:
        raise StateError("there was no batch; the model is unchanged. An iterator runs once only")
    return count


def _check(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise StateError(
            "loss(model, batch) has to return one number, a tensor that depends on what trains; the model is unchanged. Sum the "
            f"parts of the loss: it returned {type(value).__name__}"
            + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
        )
    if not torch.isfinite(value):
        raise StateError(f"the loss is {value.item()}; the model is unchanged. Look at the batches")


def require_one_process() -> None:
    """Raise a StateError under ``torch.distributed`` with several processes: each would choose for itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise StateError(
            "this runs in one process: call it before init_process_group, save the adapter or the spec, and load it in all"
        )


def is_fresh(adapter: Adapter) -> bool:
    """Return whether an adapter is the identity still: its last weights are zero."""
    weights = dict(adapter.named_parameters())
    return not any(bool(weights[name].any()) for name in adapter.rising())
