"""Gates for mixtures of experts: the router, and an adapter's bookkeeping of its load-balancing loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter

_is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling  # torch 2.1 has the latter


class Router(nn.Module):
    """Soft gates of the experts from the average of the input's pixels; each group of channels has its own.

    ``p = softmax(W mean(x) + b)``; the ``top_k`` largest are renormalised to sum to 1, the others are 0. With
    ``top_k = 1`` the gate is ``p`` itself: renormalised it would be 1 whatever the router says, and never learn.
    """

    def __init__(self, channels: int, experts: int, top_k: int, groups: int) -> None:
        super().__init__()
        self.top_k, self.groups = top_k, groups
        self.score = nn.Conv2d(channels, groups * experts, 1, groups=groups)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and probabilities, each ``(..., groups, experts)``, in float32 at least."""
        logits = self.score(x.mean((-2, -1), keepdim=True)).flatten(-3).unflatten(-1, (self.groups, -1))
        probabilities = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        chosen, places = probabilities.topk(self.top_k, -1)
        if self.top_k > 1:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, places, chosen), probabilities


def weigh_by_group(hidden: Tensor, gates: Tensor, expert: int) -> Tensor:
    """Return a map ``(..., channels, H, W)`` weighed by one expert's gates ``(..., groups, experts)``, group by group."""
    per_group = hidden.shape[-3] // gates.shape[-2]
    return hidden * gates[..., expert].to(hidden.dtype).repeat_interleave(per_group, -1)[..., None, None]


class RoutedAdapter(Adapter):
    """An adapter with a router, its options a ``load_balancing`` weight and ``top_k``; it keeps one pass's loss.

    The load-balancing loss is ``weight * K * sum_k f_k P_k``: f_k is the share of the choices that fell on expert k, P_k
    the router's mean probability for it. It is ``weight`` when all are used alike and grows as some are left out. It
    exists in training with gradients only, and is never copied or saved with the adapter.
    Reference: Fedus et al., arXiv:2101.03961, eq. 4-6, with top-k choices in place of the first.
    """

    _pending: Tensor | None = None

    def auxiliary_loss(self) -> Tensor | None:
        """Return the load-balancing loss of the last forward pass in training; None if that was none, or it is off."""
        return self._pending

    def note_balance(self, gates: Tensor, probabilities: Tensor) -> None:
        """Keep the loss of this pass, and with it nothing older; a recomputation inside a backward pass keeps none."""
        if self.options.load_balancing == 0:
            return
        if not (self.training and torch.is_grad_enabled()) or gates.numel() == 0:
            self._pending = None
            return
        experts = gates.shape[-1]
        used = (gates > 0).to(gates.dtype).flatten(0, -2).mean(0) / self.options.top_k
        loss = self.options.load_balancing * experts * (used * probabilities.flatten(0, -2).mean(0)).sum()
        if not _inside_backward():
            self._pending = loss

    def train(self, mode: bool = True) -> RoutedAdapter:
        """Set the training mode; a pending loss, and the graph behind it, is dropped."""
        self._pending = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}


def _inside_backward() -> bool:
    """Whether autograd is running: then a forward pass is a checkpoint's second one."""
    return not _is_compiling() and torch._C._current_graph_task_id() != -1
