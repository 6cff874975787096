"""The sum of parts: a module's own output, and what the active adapters add to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as hooks

from ..adapters.base import Host
from ..convolution.low_rank import Factors, stacked
from ..convolution.nodes import convolve
from ..convolution.precision import autocast_dtype, in_dtype
from ..errors import HostError, shortened
from .modules import unique_modules
from .slots import Entry, Slots, base_class


def convolved(layer: Any, x: Any, adapters: Mapping[str, Any], lean: bool) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return the output of a ``Conv2d`` with the low-rank updates beside it, and the names of adapters still to be added.

    None instead of an output: the layer's own forward has to run, and all adapters are still to be added.

    Low-rank updates run in the layer's own autograd node, which never calls their modules. An adapter that somebody
    hooked, or any while modules are hooked globally, is left to be called: a hook has to see a forward pass. All are
    left where one of them reads the layer's bare output.
    """
    if any(adapter.site.place != "parallel" or adapter.reads_host for adapter in adapters.values()):
        return convolve(layer, x, None, lean), tuple(adapters)
    factors: list[Factors] = []
    left: tuple[str, ...] = ()
    watched = bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
    for name, adapter in adapters.items():
        alone = watched or adapter._forward_hooks or adapter._forward_pre_hooks or (factors and layer.groups > 1)
        found = None if alone else adapter.factors()
        if found is None:
            left = (*left, name)
        else:
            factors.append(found)
    return convolve(layer, x, stacked(factors) if factors else None, lean), left


def adapted_output(
    module: Any, slots: Slots, names: Iterable[str], own: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return a module's own output with what the named adapters make of its input, or of that output, added.

    Args:
        module: the host.
        slots: of the host.
        names: of the adapters to add.
        own: what the module itself makes of its inputs.
        args, kwargs: its inputs.
    """
    output = own
    for name in names:
        adapter: Any = slots._modules[name]
        if adapter.site.place == "parallel":
            x = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
            output = output + _update(module, adapter, x, own)
        else:
            output = add_to_entry(own, output, slots.outputs.get(name), partial(_added, module, adapter))
    return output


def _of_output(module: Any, adapter: Any, z: Any) -> Tensor:
    """Return what an output adapter makes of a tensor; an image without its batch axis is given one meanwhile."""
    if adapter.site.geometry.linear or not isinstance(z, Tensor) or z.ndim == 4:
        return adapter(z)  # type: ignore[no-any-return]
    _require_image(module, adapter, z)
    return adapter(z.unsqueeze(0)).squeeze(0)  # type: ignore[no-any-return]


def _require_image(module: Any, adapter: Any, z: Tensor) -> None:
    """Raise a HostError unless a tensor that has not four axes is one image, ``(C, H, W)``."""
    channels = adapter.site.geometry.out_channels
    # a GroupNorm takes the first axis for the batch, whatever follows
    batched = any(isinstance(part, nn.GroupNorm) for _, part in unique_modules(module))
    if z.ndim != 3 or z.shape[0] != channels or batched:
        raise HostError(
            f"this {base_class(module).__name__} returned a tensor of shape {tuple(z.shape)}, and the adapter on its output was "
            f"planned for images, (N, {channels}, H, W) or (C, H, W). Put it on a module whose output is an image, or whose "
            "channels are the last axis"
        )


def _update(layer: Any, adapter: Any, x: Tensor, own: Tensor) -> Tensor:
    """Return what a parallel adapter adds; one that reads its host is passed the layer's weight and output."""
    wanted = _other_dtype(adapter, x)
    x = in_dtype(x, wanted)
    if adapter.reads_host:
        weight, bias = in_dtype(layer.weight, wanted), in_dtype(layer.bias, wanted)
        return _like(own, adapter(x, Host(weight, bias, in_dtype(own, wanted))))
    if adapter.site.geometry.transposed:  # its caller may have asked for an output size
        return _like(own, adapter(x, output_size=own.shape[-2:]))
    return _like(own, adapter(x))


def _added(module: Any, adapter: Any, z: Any) -> Any:
    """Return what an adapter on a module's output adds to it, in the output's dtype."""
    return _like(z, _of_output(module, adapter, in_dtype(z, _other_dtype(adapter, z))))


def _other_dtype(adapter: Any, x: Any) -> torch.dtype | None:
    """Return the dtype of an adapter's parameters if it computes in that one and ``x`` has another, else None.

    Under autocast torch casts each operand by itself.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    dtype = next((parameter.dtype for parameter in adapter.parameters()), x.dtype)
    return None if dtype == x.dtype or not dtype.is_floating_point or autocast_dtype(x) is not None else dtype


def _like(own: Any, update: Any) -> Any:
    """Return an update in the dtype of what it is added to, so that the sum has that dtype as well."""
    return in_dtype(update, own.dtype) if isinstance(own, Tensor) else update


def add_to_entry(base: Any, output: Any, entry: Entry, function: Any) -> Any:
    """Return ``output`` with ``function(base)`` added, or to the one ``entry`` of it that is a tensor."""
    if entry is None:
        if not isinstance(output, (Tensor, Proxy)):
            raise HostError(
                f"the module returned a {type(output).__name__}, not a tensor: name the entry to adapt with "
                "'output: <index or key>' in the rule"
            )
        return output + function(base)
    if isinstance(output, Proxy):
        return _with_entry(base, output, entry, function)
    missing = no_entry(output, entry)
    if missing is not None:
        raise HostError(f"{missing}: correct 'output: {entry}' in the rule")
    return _with_entry(base, output, entry_index(output, entry), function)


def _with_entry(base: Any, output: Any, index: Any, function: Any) -> Any:
    """Return ``output`` with ``function(base[index])`` added to that entry."""
    if isinstance(output, dict):
        changed = output.copy()
        changed[index] = output[index] + function(base[index])
        return changed
    entries = list(output)
    entries[index] = output[index] + function(base[index])
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


def no_entry(output: Any, entry: int | str) -> str | None:
    """Return in words why an output has no such entry that is a tensor, or None when it has one."""
    if isinstance(output, (Tensor, Proxy)):
        return f"the module returned a tensor, which has no entry {entry!r}"
    what = type(output).__name__
    try:
        value = output[entry_index(output, entry)]
    except (KeyError, IndexError, TypeError, ValueError):
        return f"the module returned a {what} without an entry {entry!r}{_entries(output)}"
    if not isinstance(value, (Tensor, Proxy)):
        return f"entry {entry!r} of the {what} that the module returned is a {type(value).__name__}, not a tensor"
    return None


def _entries(output: Any) -> str:
    """Return in words which entries an output has; nothing for what has none."""
    if isinstance(output, Mapping):
        names = [repr(key) for key in output]
    elif isinstance(output, (tuple, list)):
        fields = getattr(output, "_fields", ())
        names = [str(number) for number in range(len(output))] + [repr(field) for field in fields]
    else:
        return ""
    return f"; there are: {shortened(names) or 'none'}"


def entry_index(output: Any, entry: int | str) -> Any:
    """Return the index or key of an output's entry; a namedtuple's may be given by field, a ModelOutput's by index."""
    if (
        isinstance(entry, int)
        and hasattr(output, "to_tuple")
        and entry not in output
        and -len(output) <= entry < len(output)
    ):
        return list(output)[entry]
    named = isinstance(entry, str) and hasattr(output, "_fields") and entry in output._fields
    return output._fields.index(entry) if named else entry
