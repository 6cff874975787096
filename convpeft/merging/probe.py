"""The probe of a merge: the merged layer is built in float64 and must give what the adapted one gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..convolution.comparison import compare
from ..convolution.geometry import ConvGeometry, random_input
from ..convolution.kernels import Chain, ConvKernel
from ..errors import ConvPeftError, MergeError
from ..hosts.chains import attach_chains, set_bias
from ..hosts.rewriting import mentioned
from ..hosts.swap import plain_copy
from ..hosts.trials import exact_copies, unobserved
from .forms import Job, Merged


def merged_layer(layer: nn.Module, kernel: ConvKernel) -> nn.Module:
    """Return a plain copy of a layer, of its own class, that holds ``kernel`` in float64 on the CPU."""
    plain = plain_copy(layer)
    kernel.geometry.imprint(plain)
    plain.weight = nn.Parameter(kernel.geometry.as_weight(kernel.weight.cpu()), requires_grad=False)
    if kernel.bias is not None:
        set_bias(plain, nn.Parameter(kernel.bias.cpu(), requires_grad=False))
    return plain


def plain_chain(chain: Chain, like: nn.Module) -> nn.Sequential:
    """Return a chain as a Sequential of plain float64 layers; TF-style padding takes the host's own class, or timm's."""
    steps = []
    for step in chain:
        if step.geometry.dynamic_kernel is None:
            steps.append(step.geometry.build(step.weight.cpu(), None if step.bias is None else step.bias.cpu()))
        else:
            steps.append(merged_layer(_padding_as(like), step))
    return nn.Sequential(*steps)


def _padding_as(like: nn.Module) -> nn.Module:
    """Return a convolution that does nothing beyond TF-style padding: of the layer's class, if that is such a one."""
    if not hasattr(like, "same_pad"):
        return bare_copy(like)
    from timm.layers import Conv2dSame  # the layer is timm's own, and standardises its weight besides

    return Conv2dSame(1, 1, 1, bias=False).to(torch.float64)


def bare_copy(layer: nn.Module) -> nn.Module:
    """Return a layer of the same class and settings with no bias, no children and no hooks."""
    bare: Any = plain_copy(layer)
    bare.bias = None
    bare._modules.clear()
    bare._forward_hooks.clear()
    bare._forward_pre_hooks.clear()
    return bare


def probe(job: Job, merged: Merged) -> tuple[nn.Module | None, list[nn.Sequential]]:
    """Build the merged parts in float64 and run them against the adapted layer on random inputs.

    Returns:
        The merged layer (for kernels that replace the layer's), and the chains to add.

    Raises:
        MergeError: if the two outputs differ by more than rounding; the text gives both numbers.
    """
    chains = [plain_chain(chain, job.target) for chain in merged.chains]
    layer = None if merged.kernel is None else _merged_layer(job, merged.kernel)
    reference, candidate = _runs(job, merged, layer, chains)
    geometry = ConvGeometry.of(job.target) if merged.beside else job.adapters[0].site.geometry
    generator = torch.Generator().manual_seed(0)
    smallest = _probe_size(geometry, merged)
    for size in range(smallest, smallest + max(geometry.stride)):  # each way a stride can end at the border
        _check_alike(reference, candidate, random_input(geometry, size, generator))
    return layer, chains


def _merged_layer(job: Job, kernel: ConvKernel) -> nn.Module:
    """Return the layer that takes the place of the adapted one.

    Raises:
        MergeError: if its class does not let itself be given another weight, bias or geometry.
    """
    try:
        return merged_layer(job.target, kernel)
    except ConvPeftError:
        raise
    except Exception as error:  # of the user's own class
        raise MergeError(f"it cannot be given the merged weight: {type(error).__name__}: {error}") from error


def _check_alike(reference: Callable[[Tensor], Tensor], candidate: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raise a MergeError if two functions of ``x`` differ by more than rounding."""
    try:
        with torch.no_grad(), unobserved():
            expected, got = reference(x), candidate(x)
    except Exception as error:  # the user's own layer: whatever it raises, the refusal says it
        raise MergeError(f"it failed when run alone on an input of shape {tuple(x.shape)}: {error}") from error
    difference = compare(expected, got)
    if not difference.is_rounding:
        raise MergeError(
            f"the merged layer does not compute what the adapted one does: {difference}. Its forward is not the convolution "
            "of its weight alone"
        )


def _runs(
    job: Job, merged: Merged, layer: nn.Module | None, chains: Sequence[nn.Sequential]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return two functions of the same input: the layer as adapted, and as merged."""
    if layer is None and not merged.beside:  # on a block's output: the block is the same in both, so only what is added
        parts = exact_copies(job.adapters)
        return lambda z: _added(torch.zeros_like(z), parts, z), lambda z: _added(torch.zeros_like(z), chains, z)
    adapted = exact_copies([job.layer])[0] if job.target is job.layer else _last_step(job)
    if layer is not None:
        return adapted, layer
    chained = plain_copy(job.target)
    attach_chains(chained, exact_copies([*chains]), beside=True, taken=mentioned(job.target))
    return adapted, chained


def _last_step(job: Job) -> Callable[[Tensor], Tensor]:
    """Return what the last step of an adapted block makes of its input, adapters on the block's output included."""
    own, adapters = plain_copy(job.target), exact_copies(job.adapters)
    return lambda x: _added(own(x), adapters)


def _added(output: Tensor, parts: Sequence[nn.Module], x: Tensor | None = None) -> Tensor:
    """Return ``output`` and what each part makes of ``x`` (unset: of the output) together."""
    return sum((part(output if x is None else x) for part in parts), output)


def _probe_size(geometry: ConvGeometry, merged: Merged) -> int:
    """Return a size at which every padding is smaller than the input and a few pixels are no border."""
    kernels = [step.geometry for chain in merged.chains for step in chain]
    kernels += [merged.kernel.geometry] if merged.kernel else []
    spans = [(k - 1) * d + 1 for g in (geometry, *kernels) for k, d in zip(g.kernel_size, g.dilation, strict=True)]
    return max([*spans, *(side + 1 for g in kernels for side in g.padding)]) + 2 * max(geometry.stride) + 1
