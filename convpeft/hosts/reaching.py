"""Whether a loss on a model's outputs can reach its adapters: one forward pass with gradients, whose graph is searched.

No backward pass runs. Two things cut a part of a model off: ``torch.no_grad()`` inside of it, and a reentrant checkpoint none
of whose inputs requires gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .modules import device_and_dtype, is_batchnorm_like
from .slots import slots_of
from .trials import deep_copy
from .uncompiled import uncompiled

NO_GRAD = "it ran under torch.no_grad()"
CHECKPOINT = (
    "it ran in a reentrant checkpoint none of whose inputs requires gradients; checkpoint(..., use_reentrant=False) lets "
    "them through"
)
DETACHED = "nothing that the model returned depends on it in a way that gradients follow (detached?)"


@dataclass
class _Calls:
    """How a host ran: with gradients at least once, or without, and inside which autograd functions."""

    with_gradients: bool = False
    functions: list[Any] = field(default_factory=list)


def cut_off(root: nn.Module, adapters: Iterable[tuple[nn.Module, nn.Module]], args: Any, kwargs: Any) -> dict[int, str]:
    """Return, by ``id``, the adapters that ran and that no gradient of the outputs would reach, and why.

    A copy runs that shares the model's parameters, in training mode, for that is where checkpoints are used: as the model
    is, or if it is in eval mode all over, with norms held. Where that fails it runs in eval mode. What cannot be told is
    left out: a copy that cannot be made or does not run, or outputs in objects that cannot be looked into.

    Args:
        root: the model to call.
        adapters: each with its host; those without a parameter that requires gradients are not asked about.
        args, kwargs: what the model is called with.
    """
    asked = [(host, adapter) for host, adapter in adapters if any(p.requires_grad for p in adapter.parameters())]
    if not asked:
        return {}
    in_training = any(module.training for module in root.modules())
    for train in (None if in_training else True, False):
        memo: dict[int, Any] = {id(parameter): parameter for parameter in root.parameters()}
        try:
            copy = deep_copy(root, memo)
            hosts = {id(host): memo[id(host)] for host, _ in asked}
            _set_training(copy, train)
            ran, output = _run(copy, hosts, args, kwargs)
        except Exception:  # of the user's model, which may need targets in training mode
            continue
        return _judged(asked, ran, output, in_training=train is not False)
    return {}


def _set_training(copy: nn.Module, mode: bool | None) -> None:
    """Set the mode of a copy's modules, in place, without calling ``train``, which a user may have replaced."""
    for module in copy.modules() if mode is not None else ():
        slots = slots_of(module)
        held = is_batchnorm_like(module) or (slots is not None and slots.held)
        module.training = bool(mode) and not held


def _run(copy: nn.Module, hosts: Mapping[int, Any], args: Any, kwargs: Any) -> tuple[dict[int, _Calls], Any]:
    """Return how each host ran, by the ``id`` of the original, and the output."""
    ran: dict[int, _Calls] = {}

    def note(key: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            calls = ran.setdefault(key, _Calls())
            if torch.is_grad_enabled():
                calls.with_gradients = True
            else:
                calls.functions.append(_function_around())

        return hook

    device, _ = device_and_dtype(copy)
    handles = [host.register_forward_pre_hook(note(key)) for key, host in hosts.items()]
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.enable_grad(),
            uncompiled(),
        ):
            return ran, copy(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _function_around() -> Any:
    """Return the outermost autograd function whose forward is running, which is a node of the graph; or None."""
    found, frame = None, sys._getframe()
    while frame is not None:
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        if isinstance(context, torch._C._FunctionBase):
            found = context
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _judged(
    asked: list[tuple[nn.Module, nn.Module]], ran: Mapping[int, _Calls], output: Any, *, in_training: bool
) -> dict[int, str]:
    """Return what cuts each adapter off, by ``id``, for those that are."""
    tensors, all_seen = _tensors(output)
    nodes, leaves = _graph(tensors)
    found: dict[int, str] = {}
    for host, adapter in asked:
        calls = ran.get(id(host))
        if calls is None or any(id(p) in leaves for p in adapter.parameters()):
            continue
        inside = [function for function in calls.functions if function is not None]
        if any(id(function) in nodes for function in inside) or (inside and not all_seen):
            continue
        if not calls.with_gradients and (nodes or in_training):
            found[id(adapter)] = NO_GRAD if not inside else CHECKPOINT
        elif calls.with_gradients and nodes and in_training and all_seen:
            found[id(adapter)] = DETACHED
    return found


def _graph(tensors: Iterable[Tensor]) -> tuple[dict[int, Any], set[int]]:
    """Return the nodes of the graph behind tensors, by ``id``, and the ``id`` of each leaf that would get a gradient."""
    nodes: dict[int, Any] = {}
    leaves = {id(tensor) for tensor in tensors if tensor.requires_grad and tensor.grad_fn is None}
    todo: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node is None or id(node) in nodes:
            continue
        nodes[id(node)] = node  # kept alive, or its id may be another's
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [below for below, _ in node.next_functions]
    return nodes, leaves


def _tensors(output: Any) -> tuple[list[Tensor], bool]:
    """Return the tensors in an output, and whether it could be looked into everywhere."""
    found: list[Tensor] = []
    all_seen, seen = True, {}
    todo = [output]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (tuple, list, set, frozenset)):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            todo += vars(value).values()
        elif value is not None and not isinstance(
            value, (bool, int, float, complex, str, bytes, torch.Size, torch.dtype)
        ):
            all_seen = False
    return found, all_seen
