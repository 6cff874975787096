"""Check that a peft method computes what it claims on a layer of some shape, by trying it on a plain layer."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...convolution.comparison import compare
from ...convolution.geometry import ConvGeometry, random_input
from ...convolution.modes import making_on
from .layers import change_of, stand_in, without_host, wrap

_MOST = 2**26  # elements in the parameters and buffers of one adapter: half a gigabyte in float64


class _Seen(Exception):  # never leaves this module
    """A check failed; the text is the refusal that ``probe`` returns."""


@lru_cache(maxsize=512)
def probe(method: str, settings: tuple[tuple[str, Any], ...], shape: ConvGeometry) -> str | None:
    """Return why a method cannot be used on a layer of this shape, or None when it can, by trying it on a plain layer.

    Six things must hold, in float64: peft builds a layer with exactly these options; its start does not depend on the
    layer's weight; fresh, it changes nothing, bitwise; every parameter gets a gradient; with random parameters peft's
    own forward in training mode is the convolution with the changed weight; and its state_dict, loaded into another
    such layer, makes the same change there. The layer has no padding, stride or dilation: with those, peft's forwards
    differ from the layer they wrap, and convpeft does not run them.

    Args:
        method: name of the peft method.
        settings: the method's options, as ``(name, value)`` pairs.
        shape: channels, kernel and groups of the layer.
    """
    options = dict(settings)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
            warnings.simplefilter("ignore")
            for check in (_check_size, _check_options, _check_start, _check_fresh, _check_forward, _check_round_trip):
                check(method, options, shape)
    except _Seen as seen:
        return str(seen)
    return None


def _build(method: str, options: dict[str, Any], shape: ConvGeometry, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return peft's layer around a float64 layer with random weights, and that inner layer."""
    torch.manual_seed(seed)
    host = stand_in(shape).double()
    torch.manual_seed(0)
    try:
        return wrap(method, options, host).double(), host
    except Exception as error:  # whatever peft raises becomes the refusal
        raise _Seen(f"peft's {method} does not serve it: {_one_line(error)}") from error


def _check_size(method: str, options: dict[str, Any], shape: ConvGeometry) -> None:
    try:
        with making_on(torch.device("meta")):
            draft = without_host(wrap(method, options, stand_in(shape)))
    except Exception:  # some methods cannot be built on meta; any other error is raised again by the next check
        return
    count = sum(tensor.numel() for tensor in draft.state_dict().values())
    if count > _MOST:
        raise _Seen(f"peft's {method} would need {count:,} numbers here; at most {_MOST:,} are allowed for one layer")


def _check_options(method: str, options: dict[str, Any], shape: ConvGeometry) -> None:
    """Refuse options that peft adjusts, which it says in a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _build(method, options, shape, 0)
    changed = [str(entry.message) for entry in caught if "djusted" in str(entry.message)]
    if changed:
        raise _Seen(f"peft's {method} would not take the options as they are: {' '.join(changed[0].split())}")


def _check_start(method: str, options: dict[str, Any], shape: ConvGeometry) -> None:
    """Refuse methods that initialise from the layer's weight: an adapter is built, and loaded, without it."""
    first, second = (_own_tensors(_build(method, options, shape, seed)[0]) for seed in (1, 2))
    differ = [key for key in first if key not in second or not torch.equal(first[key], second[key])]
    if differ:
        reason = f"starts from the layer's own weight ({differ[0]} depends on it), which an adapter file does not hold"
        raise _Seen(f"peft's {method} {reason}")


def _check_fresh(method: str, options: dict[str, Any], shape: ConvGeometry) -> None:
    wrapped, host = _build(method, options, shape, 1)
    weight, bias = _detached(host)
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad and "base_layer" not in name]
    if not trainable:
        raise _Seen(f"peft's {method} has nothing to learn here")
    change = _change(method, without_host(wrapped), weight, bias)
    parts = [part for part in change if part is not None]
    largest = max(float(part.detach().abs().max()) for part in parts)
    if largest != 0:
        raise _Seen(
            f"peft's {method} is not the identity when fresh: it changes the weight by up to {largest:.3g}, where the "
            f"largest weight is {float(weight.abs().max()):.3g}"
        )


def _check_forward(method: str, options: dict[str, Any], shape: ConvGeometry) -> None:
    wrapped, host = _build(method, options, shape, 1)
    weight, bias = _detached(host)
    generator = torch.Generator().manual_seed(0)
    _randomise(wrapped, generator)
    x = random_input(shape, max(shape.kernel_size) + 2, generator)
    try:
        with torch.no_grad():
            theirs = wrapped.train()(x)
            wrapped.eval()
    except Exception as error:
        at = f"on an input of shape {tuple(x.shape)}"
        raise _Seen(f"peft's own {method} layer fails {at}: {_one_line(error)}") from error
    method_layer = without_host(wrapped)
    change = _change(method, method_layer, weight, bias)
    _check_gradients(method, method_layer, [part for part in change if part is not None])
    with torch.no_grad():
        changed_bias = bias if change.bias is None else bias + change.bias
        ours = shape.convolve(x, (weight + change.weight).reshape(shape.weight_shape()), changed_bias)
    if theirs.shape != ours.shape:
        raise _Seen(f"peft's {method} changes the output's shape: {tuple(theirs.shape)}, not {tuple(ours.shape)}")
    apart = compare(ours, theirs, 1e-9)
    if not apart.is_rounding:
        raise _Seen(
            f"peft's {method} does not compute the convolution with its changed weight: its output differs by "
            f"{apart.difference:.3g}, where the largest is {apart.largest:.3g}"
        )


def _randomise(wrapped: nn.Module, generator: torch.Generator) -> None:
    """Add noise to each of the method's own parameters, in place."""
    for name, parameter in wrapped.named_parameters():
        if "base_layer" not in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data.double() + 0.1 * noise


def _check_round_trip(method: str, options: dict[str, Any], shape: ConvGeometry) -> None:
    """Refuse methods that store part of their state outside their parameters and buffers."""
    wrapped, host = _build(method, options, shape, 1)
    weight, bias = _detached(host)
    _randomise(wrapped, torch.Generator().manual_seed(0))
    torch.manual_seed(7)  # another initialisation, which the loaded tensors must replace entirely
    saved, other = without_host(wrapped), without_host(wrap(method, options, stand_in(shape).double()).double())
    other.load_state_dict(saved.state_dict())
    for before, after in zip(_change(method, saved, weight, bias), _change(method, other, weight, bias), strict=True):
        if before is not None and not torch.equal(before, after):
            raise _Seen(
                f"peft's {method} keeps a random choice outside its tensors, so a saved adapter would come back another"
            )


def _check_gradients(method: str, wrapped: nn.Module, parts: list[Tensor]) -> None:
    parameters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    total = sum(part.square().sum() for part in parts)
    if not isinstance(total, Tensor) or not total.requires_grad:
        raise _Seen(f"peft's {method} gives its parameters no gradient through its changed weight")
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    unused = [name for name, grad in zip(parameters, grads, strict=True) if grad is None]
    if unused:
        raise _Seen(f"peft's {method} does not use {', '.join(unused)} in its changed weight, so it would never learn")


def _change(method: str, wrapped: nn.Module, weight: Tensor, bias: Tensor) -> Any:
    try:
        return change_of(method, wrapped, weight, bias)
    except Exception as error:
        raise _Seen(f"peft's {method} gives no changed weight here: {_one_line(error)}") from error


def _own_tensors(wrapped: nn.Module) -> dict[str, Tensor]:
    tensors = [*wrapped.named_parameters(), *wrapped.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if "base_layer" not in name}


def _detached(host: Any) -> tuple[Tensor, Tensor]:
    return host.weight.detach().clone(), host.bias.detach().clone()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
