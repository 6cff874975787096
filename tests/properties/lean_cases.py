"""Small nets that write to a map between an activation and a layer, in any way that torch allows, and their gradients."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft.convolution import nodes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu in place": lambda h: F.silu(h, inplace=True),
    "hardswish": F.hardswish,
    "hardswish in place": lambda h: F.hardswish(h, inplace=True),
    "mish": F.mish,
    "mish in place": lambda h: F.mish(h, inplace=True),
    "gelu": F.gelu,
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "leaky relu": lambda h: F.leaky_relu(h, 0.2),
    "leaky relu in place": lambda h: F.leaky_relu(h, 0.1, inplace=True),
    "relu6": F.relu6,
    "hardtanh in place": lambda h: F.hardtanh(h, -0.5, 0.7, inplace=True),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu of silu": lambda h: F.silu(F.silu(h)),
    "product": lambda h: F.silu(h) * 1.5,
}
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda h: h,
    "clone": torch.clone,
    "clone of a clone": lambda h: h.clone().clone(),
    "channels last": lambda h: h.contiguous(memory_format=torch.channels_last),
    "added in place": lambda h: h.add_(0.5),
    "added in place to a clone": lambda h: h.clone().add_(0.5),
    "view": lambda h: h.view(h.shape),
    "crop": lambda h: h[..., 1:, :],
    "transposed": lambda h: h.transpose(2, 3),
    "expanded": lambda h: h[:1].expand_as(h),
}


def _raw(t: Tensor) -> None:
    """Set the first number to 3, as a kernel of somebody's own would."""
    (ctypes.c_char * t.element_size()).from_address(t.data_ptr())[:] = (
        torch.tensor([3.0], dtype=t.dtype).view(torch.uint8).numpy().tobytes()
    )


def _under(context: Callable[[], Any], change: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def write(t: Tensor) -> None:
        with context():
            change(t)

    return write


def _set(t: Tensor) -> None:
    t[:, :2] = 0.25


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "channels, under no_grad": _under(torch.no_grad, _set),
    "scaled, under no_grad": _under(torch.no_grad, lambda t: t.mul_(1.5)),
    "one number, under no_grad": _under(torch.no_grad, lambda t: t[0, 0, 1].fill_(2.0)),
    "in inference mode": _under(torch.inference_mode, lambda t: t.mul_(0.5)),
    "with autograd": _set,
    "scaled, with autograd": lambda t: t.mul_(1.5),
    "data": lambda t: t.data.mul_(1.5),
    "data, one number": lambda t: t.data[0, 0, 0, 0].fill_(3.0),
    "data, channels": lambda t: _set(t.data),
    "data, rolled": lambda t: t.data.copy_(t.data.roll(1, 0)),
    "data, not a number": lambda t: t.data[0, 0, 0, 0].fill_(float("nan")),
    "other data": lambda t: setattr(t, "data", t.data * 1.5),
    "data of a view": lambda t: t[:, 1:].data.mul_(1.5),
    "view of data": lambda t: t.data.flatten(2)[..., 0].mul_(2.0),
    "detached": lambda t: t.detach().mul_(1.5),
    "detached view": lambda t: t.detach()[:, 1].zero_(),
    "view, under no_grad": _under(torch.no_grad, lambda t: t.permute(0, 2, 3, 1)[..., 0].mul_(2.0)),
    "numpy": lambda t: t.detach().numpy().__setitem__((slice(None), 0), 0.5),
    "dlpack": lambda t: torch.from_dlpack(t.detach()).mul_(1.5),
    "storage": lambda t: torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).mul_(1.5),
    "raw memory": _raw,
    "each": _under(torch.no_grad, lambda t: torch._foreach_mul_([t], 1.5)),
    "out": lambda t: torch.mul(t.data, 1.5, out=t.data),
    "the same numbers": lambda t: t.data.copy_(t.data.clone()),
    "the same numbers, under no_grad": _under(torch.no_grad, lambda t: t.mul_(1.0)),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "view": lambda y: y.view(y.shape),
    "slice": lambda y: y[:, :4],
    "crop": lambda y: y[..., 1:, :],
    "halves exchanged": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "clone": torch.clone,
}


@contextlib.contextmanager
def _once() -> Iterator[None]:
    """Keep each saved tensor under a number, and give it back once."""
    store: dict[int, Tensor] = {}

    def pack(t: Tensor) -> int:
        store[len(store)] = t
        return len(store) - 1

    with saved_tensors_hooks(pack, lambda number: store.pop(number)):
        yield


HOOKS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "identity": lambda: saved_tensors_hooks(lambda t: t, lambda t: t),
    "once": _once,
    "cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "detached": lambda: saved_tensors_hooks(lambda t: t.detach(), lambda t: t),
    "changed when unpacked": lambda: saved_tensors_hooks(lambda t: t.detach() * 2, lambda t: t / 2),
}
WHERE = ("both", "activation", "layer")
AROUND = (
    "nothing",
    "checkpoint of both",
    "checkpoint of the layer",
    "hook on the map",
    "forward hook",
    "backward hook",
)
KINDS: dict[str, dict[str, Any]] = {
    **{form: {"kind": "lora", "rank": 2, "evaluate": form} for form in ("auto", "separate", "summed", "weight")},
    "scaled": {"kind": "lora", "rank": 2, "alpha": 4},
    "pointwise": {"kind": "lora", "rank": 2, "pointwise": True},
    "rep_mona": {"kind": "rep_mona", "rank": 2, "kernel_sizes": (3,)},
    "conv_lora": {"kind": "conv_lora", "rank": 2, "scales": (1, 2), "top_k": 2},
}
ORDERS = ("first", "first", "first", "second", "batched")
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06}
FROZEN = ("nothing", "nothing", "A", "B", "the activation's side")


class Case(NamedTuple):
    """What one net does; each field is a key or a value of the tables above."""

    seed: int
    activation: str
    before: str
    write: str
    write_source: str
    view: str
    hooks: str
    where: str
    around: str
    kind: str
    order: str
    frozen: str
    kernel: int
    norm: bool
    dtype: torch.dtype


def drawn(seed: int) -> Case:
    """Return the case of a seed. Half of them have no hooks, most write to the map or to nothing, most are in float64."""
    pick = random.Random(seed)
    plain, source = pick.random() < 0.5, pick.random() < 0.15
    dtype = torch.float64 if pick.random() < 0.85 else pick.choice(list(DTYPES))
    return Case(
        seed,
        pick.choice(list(ACTIVATIONS)),
        pick.choice(list(BEFORE)),
        pick.choice(list(WRITES)),
        pick.choice(list(WRITES)) if source else "none",
        pick.choice(list(VIEWS)) if pick.random() < 0.3 else "itself",
        "none" if plain else pick.choice(list(HOOKS)),
        pick.choice(WHERE),
        "nothing" if plain or pick.random() < 0.5 else pick.choice(AROUND),
        pick.choice(list(KINDS)),
        pick.choice(ORDERS) if dtype == torch.float64 else "first",
        pick.choice(FROZEN),
        pick.choice((1, 3)),
        pick.random() < 0.3,
        dtype,
    )


class Net(nn.Module):
    """A layer, perhaps a norm, an activation, a write, a layer that reads the map, and one more."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if case.norm else nn.Identity()
        self.middle = nn.Conv2d(4, 6, case.kernel)
        self.last = nn.Conv2d(6, 2, 1)
        self.case = case
        self.map: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        source = BEFORE[self.case.before](self.norm(self.first(x)))
        if self.case.around == "checkpoint of both":
            return self.last(F.silu(checkpoint(self._between, source, use_reentrant=False)))
        return self.last(F.silu(self._between(source)))

    def _between(self, source: Tensor) -> Tensor:
        case = self.case
        with HOOKS[case.hooks]() if case.where in ("both", "activation") else contextlib.nullcontext():
            y = ACTIVATIONS[case.activation](source)
        if case.around == "hook on the map" and y.requires_grad:
            y.register_hook(lambda grad: grad * 2)
        WRITES[case.write](y)
        WRITES[case.write_source](source)
        self.map = y
        seen = VIEWS[case.view](y)
        with HOOKS[case.hooks]() if case.where in ("both", "layer") else contextlib.nullcontext():
            if case.around == "checkpoint of the layer":
                return checkpoint(self.middle, seen, use_reentrant=False)
            return self.middle(seen)


def adapted(case: Case, lean: bool) -> Net:
    """Return the net of a case with adapters on all layers, trained a little."""
    torch.manual_seed(case.seed)
    net = Net(case).to(case.dtype).train()
    convpeft.inject(net, {"rules": [{"match": "**", "only": "Conv2d", **copy.deepcopy(KINDS[case.kind])}]}, lean=lean)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
        own = (".down", ".up")[case.frozen == "B"] if case.frozen in ("A", "B") else "first."
        if case.frozen != "nothing" and own in name:
            parameter.requires_grad_(False)
    if case.around == "forward hook":
        net.middle.register_forward_pre_hook(lambda module, args: args[0].data.mul_(0.5) and None)
    if case.around == "backward hook":
        net.middle.register_full_backward_hook(lambda module, grads, outs: None)
    return net


def gradients(case: Case, lean: bool) -> dict[str, Tensor] | str:
    """Return the gradients of a case by name, or the class of the error that torch raises for it."""
    net = adapted(case, lean)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype).requires_grad_()
    try:
        output = net(x)
        wanted = {"x": x, **{name: p for name, p in net.named_parameters() if p.requires_grad}}
        if net.map is not None and net.map.requires_grad and case.around != "checkpoint of both":
            wanted["map"] = net.map
        return dict(zip(wanted, _asked(case.order, output, list(wanted.values())), strict=True))
    except (RuntimeError, NotImplementedError, TypeError, KeyError) as error:
        return type(error).__name__


def _asked(order: str, output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    if order == "batched":
        flat = output.reshape(-1)[:3]
        eye = torch.eye(3, dtype=output.dtype)
        return list(torch.autograd.grad(flat, wanted, eye, is_grads_batched=True, allow_unused=True))
    again = order == "second"
    first = torch.autograd.grad(output.square().sum(), wanted, create_graph=again, allow_unused=True)
    if not again:
        return list(first)
    total = sum(grad.square().sum() for grad in first if grad is not None)
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def expected(case: Case) -> dict[str, Tensor] | str:
    """Return the same of a net with ``lean=False`` that recomputes no input; second gradients by torch's operations only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(nodes, "origin_of", return_value=None))
        if case.order != "first":
            stack.enter_context(mock.patch.object(nodes, "is_eager", return_value=False))
        return gradients(case, lean=False)


def difference(case: Case) -> str | None:
    """Return how the gradients with ``lean`` differ from those without, or None if they do not."""
    wanted, got = expected(case), gradients(case, lean=True)
    if isinstance(wanted, str) or isinstance(got, str):
        return None if wanted == got else f"{case}: {got} where lean=False gives {wanted}"
    for name, right in wanted.items():
        found = got[name]
        if (right is None) != (found is None):
            return f"{case}: {name} is {found} where lean=False gives {right}"
        if right is None:
            continue
        finite = right.isfinite()
        scale = float(right[finite].abs().max()) if finite.any() else 0.0
        if not torch.equal(finite, found.isfinite()):
            return f"{case}: {name} is finite elsewhere"
        apart = float((right[finite] - found[finite]).abs().max()) if finite.any() else 0.0
        if apart > DTYPES[case.dtype] * max(scale, 1e-6):
            return f"{case}: {name} differs by {apart:.3g} of {scale:.3g}"
    return None
