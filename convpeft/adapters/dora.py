"""DoRA: the layer's weight as magnitude times direction; LoRA updates the direction, the magnitude trains apart.

Paper: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_ratio(weight: Tensor, update: Tensor, magnitude: Tensor, detach_norm: bool = True) -> Tensor:
    """Return ``m / ||W + U||`` for each output channel, with ``m = ||W|| + d``; exactly 1 while U and d are zero.

    The paper learns m itself, which starts at ``||W||``. Learning the difference d gives the same gradients and the
    same steps, and a fresh adapter is exactly the identity without storing ``||W||``: both norms are then computed from
    the same numbers, and a number divided by itself is 1. With another base checkpoint ``||W||`` changes by itself.

    A channel whose ``W + U`` is all zero has no direction: its ratio is 1, whatever its magnitude.

    Args:
        weight: W, ``(out, ...)``.
        update: U, as W or flattened after the first axis.
        magnitude: d, ``(out,)``.
        detach_norm: treat ``||W + U||`` as a constant in backward (the paper's section 4.3), which saves memory.

    Returns:
        Shape ``(out,)``, in float64 if ``weight`` is, else in float32.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> magnitude_ratio(weight, torch.zeros(2, 2), torch.tensor([0.0, 1.0]))
        tensor([1.0000, 1.5000])

    Reference: arXiv:2402.09353, eq. 5, and eq. 11 for the constant norm.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat = weight.flatten(1).to(wide).contiguous()
    before = torch.linalg.vector_norm(flat, dim=1).detach()
    after = torch.linalg.vector_norm((flat + update.flatten(1).to(wide)).contiguous(), dim=1)
    if detach_norm:
        after = after.detach()
    has_direction = after > 0
    ratio = (before + magnitude.to(wide)) / torch.where(has_direction, after, torch.ones_like(after))
    return torch.where(has_direction, ratio, torch.ones_like(ratio))
