"""Mixtures of experts: the router that computes the gates, and the load-balancing loss of an adapter with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..convolution.nodes import is_compiling
from .base import Adapter
from .layers import Filter


class Router(nn.Module):
    """Compute the experts' gates from the input averaged over its pixels, separately for each group of channels.

    ``p = softmax(W mean(x) + b)``; the ``top_k`` largest are renormalised to sum to 1, the others are 0. With
    ``top_k = 1`` the gate is ``p`` itself: renormalised, it would always be 1 and give the router no gradient.
    """

    def __init__(self, channels: int, experts: int, top_k: int, groups: int) -> None:
        super().__init__()
        self.top_k, self.groups = top_k, groups
        self.score = Filter(channels, groups * experts, 1, groups=groups)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and probabilities, each ``(..., groups, experts)``, in float32 or float64."""
        logits = self.score(x.mean((-2, -1), keepdim=True))[..., 0, 0]
        logits = logits.unflatten(logits.ndim - 1, (self.groups, -1))
        probabilities = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        chosen, indices = probabilities.topk(self.top_k, -1)
        if self.top_k > 1:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, indices, chosen), probabilities


def weigh_by_group(hidden: Tensor, gates: Tensor, expert: int) -> Tensor:
    """Return a map ``(..., channels, H, W)`` times one expert's gates ``(..., groups, experts)``, group by group."""
    per_group = hidden.shape[-3] // gates.shape[-2]
    shares = gates[..., expert].to(hidden.dtype)
    each = shares.unsqueeze(shares.ndim).expand(
        *shares.shape, per_group
    )  # an exported repeat_interleave repeats the whole
    return hidden * each.flatten(shares.ndim - 1)[..., None, None]


class RoutedAdapter(Adapter):
    """An adapter with a router and the options ``load_balancing`` and ``top_k``; it keeps the last pass's loss.

    The load-balancing loss is ``load_balancing * K * sum_k f_k P_k``: of K experts, f_k is the share of the choices
    that fell on expert k, P_k the router's mean probability for it. It equals ``load_balancing`` when all experts are
    used equally, and grows otherwise. It exists only in training with gradients, and is never copied or saved.
    Reference: Fedus et al., arXiv:2101.03961, eq. 4-6, with top-k choices instead of the first.
    """

    _pending: Tensor | None = None

    def auxiliary_loss(self) -> Tensor | None:
        """Return the load-balancing loss of the last forward pass, or None if that was not in training or it is off."""
        return self._pending

    def note_balance(self, gates: Tensor, probabilities: Tensor) -> None:
        """Store the loss of this pass in place of the last; a checkpoint's recomputation in backward stores nothing."""
        if self.options.load_balancing == 0:
            return
        if not (self.training and torch.is_grad_enabled()) or gates.numel() == 0:
            self._pending = None
            return
        experts = gates.shape[-1]
        share = (gates > 0).to(gates.dtype).flatten(0, -2).mean(0) / self.options.top_k
        loss = self.options.load_balancing * experts * (share * probabilities.flatten(0, -2).mean(0)).sum()
        if not _inside_backward():
            self._pending = loss

    def train(self, mode: bool = True) -> RoutedAdapter:
        """Set the training mode; the stored loss is dropped, and its graph with it."""
        self._pending = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}


def _inside_backward() -> bool:
    """Return whether a backward pass is running: a forward pass in it is a checkpoint's recomputation."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1
