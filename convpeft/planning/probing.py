"""Probes: what only running a copy tells of a module: its output's channels, whether it is the convolution it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convolution.comparison import compare
from ..convolution.geometry import PLAIN_HOSTS, ConvGeometry, random_input
from ..hosts.forward import entry_index
from ..hosts.modules import base_class, device_and_dtype, is_sequence
from ..hosts.swap import plain_copy
from ..hosts.trials import private_copy, unobserved

_IMAGE = (1, 3, 64, 64)


@dataclass(frozen=True)
class OutputShape:
    """The channels of a module's output: how many, and whether they are the last axis."""

    channels: int
    channels_last: bool


def known_channels(module: nn.Module) -> OutputShape | None:
    """Return the output's channels where the module, or the last layer of a Sequential, says them; else None."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return OutputShape(module.out_channels, False)
    if isinstance(module, nn.Linear):
        return OutputShape(module.out_features, True)
    if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
        return OutputShape(module.num_features, False)
    if isinstance(module, nn.GroupNorm):
        return OutputShape(module.num_channels, False)
    if isinstance(module, nn.LayerNorm):
        return OutputShape(module.normalized_shape[-1], True)
    if is_sequence(module):
        for step in reversed(list(module)):  # type: ignore[call-overload]
            if not _keeps_channels(step):
                return known_channels(step)
    return None


def probe_outputs(
    root: nn.Module, names: Sequence[str], entries: dict[str, Any], example: Any
) -> dict[str, OutputShape]:
    """Run a copy of the model once and return the output shapes of the named modules that were reached.

    Args:
        root: the user's model; a copy of it runs, in eval mode and without gradients.
        names: modules to watch.
        entries: for each name the entry of its output to look at, or None.
        example: example inputs (a tensor, or a tuple of positional inputs); None tries one 3x64x64 image.

    Returns:
        Shapes by name; a module that did not run, or returned no tensor, is missing. A model that cannot run on the
        generic image gives an empty result; one that cannot run on the user's own example raises its own error.
    """
    try:
        model = private_copy(root).eval()
        device, dtype = device_and_dtype(root)
        inputs = as_inputs(torch.zeros(_IMAGE, device=device, dtype=dtype) if example is None else example)
        with watch([(name, model.get_submodule(name)) for name in names]) as outputs, torch.no_grad(), unobserved():
            model(*inputs)
    except Exception:
        if example is not None:
            raise
        return {}
    found: dict[str, OutputShape] = {}
    for name, output in outputs.items():
        tensor = pick(output, entries.get(name))
        if isinstance(tensor, Tensor) and tensor.ndim >= 2:
            last = tensor.ndim != 4
            found[name] = OutputShape(tensor.shape[-1 if last else 1], last)
    return found


def as_inputs(example: Any) -> tuple[Any, ...]:
    """Return example inputs as the positional arguments of a call."""
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def pick(output: Any, entry: int | str | None) -> Any:
    """Return the named entry of a module's output, the output itself for None; None when there is no such entry."""
    if entry is None:
        return output
    try:
        return output[entry_index(output, entry)]
    except (KeyError, IndexError, TypeError, ValueError):
        return None


@contextmanager
def watch(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, Any]]:
    """Collect, by name, what each module returns on its first call inside the context."""
    outputs: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs.setdefault(name, output)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def unlike_its_convolution(layer: nn.Module) -> str | None:
    """Return in what way a layer's output cannot take a parallel adapter, found by running a copy of it; or None.

    Only subclasses are run: their forward may do more than ``conv(x, weight)``. Other values are fine, since the adapter is
    added to whatever comes out and a merge is probed again. Another shape is not, for any way a stride can end at the
    border.
    """
    geometry = ConvGeometry.of(layer)
    smallest = _probe_size(geometry)
    sizes = range(smallest, smallest + max(geometry.stride))
    plain = private_copy(layer).to(device="cpu").eval()
    return next(filter(None, (_unlike_at(plain, geometry, size) for size in sizes)), None)


def _unlike_at(plain: nn.Module, geometry: ConvGeometry, size: int) -> str | None:
    x = random_input(geometry, size, torch.Generator().manual_seed(0))
    try:
        output = _run_alone(plain, x)
    except Exception as error:  # the user's own layer: whatever it raises, the plan says it
        return _failed(x, error)
    expected = geometry.convolve(x, torch.zeros(geometry.weight_shape(), dtype=x.dtype, device="cpu")).shape
    if isinstance(output, Tensor) and output.shape == expected:
        return None
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    return f"its forward gives {got} where its geometry says {tuple(expected)}: it is not the convolution it declares"


def _run_alone(plain: Any, x: Tensor) -> Any:
    """Return what a layer makes of ``x``, in float64, or in float32 where it knows no other (quantisation, say)."""
    with torch.no_grad(), unobserved():
        try:
            return plain.to(dtype=torch.float64)(x)
        except Exception:
            return plain.to(dtype=torch.float32)(x.float())


def _failed(x: Tensor, error: Exception) -> str:
    return f"its forward failed on an input of shape {tuple(x.shape)}: {error}"


def _probe_size(geometry: ConvGeometry) -> int:
    """Return a size at which the kernel sees pixels that are no border, and every padding is smaller than the input."""
    return max(2 * max(geometry.kernel_size) * max(geometry.dilation) + 5, *(side + 2 for side in geometry.padding))


def unreadable(layer: nn.Module) -> str | None:
    """Return why an adapter that computes with its layer's weight cannot do so here, or None when it can.

    The weight must be a plain parameter, since a computed one may change with each access. The layer's forward must be the
    convolution of that weight, or the adapter would not know what a change of the weight does to the output.
    """
    if layer._parameters.get("weight") is None:
        return "it computes with the layer's weight, which is no plain parameter here (parametrised, weight-normed or pruned)"
    if base_class(layer) in PLAIN_HOSTS:
        return None
    geometry = ConvGeometry.of(layer)
    generator = torch.Generator().manual_seed(0)
    x = random_input(geometry, _probe_size(geometry), generator)
    plain = plain_copy(layer)
    with torch.no_grad(), unobserved():
        declared = geometry.convolve(x, geometry.as_kernel(plain.weight), plain.bias)
        try:
            own = plain(x)
        except Exception as error:
            return f"it computes with the layer's weight, in float64 when it is checked, and {_failed(x, error)}"
    apart = compare(declared, own, 1e-9)
    if apart.is_rounding:
        return None
    return (
        "it computes with the layer's weight, and this layer's forward is not the convolution of its weight alone: on a "
        f"random input they differ by {apart.difference:.3g}, where the largest output is {apart.largest:.3g}"
    )


def _keeps_channels(module: nn.Module) -> bool:
    if isinstance(module, (nn.GLU, nn.MultiheadAttention)):  # they live among the activations
        return False
    kept = isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d))
    return kept or base_class(module).__module__ == "torch.nn.modules.activation"
