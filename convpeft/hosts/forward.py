"""The sum of parts: a module's own output, and what the active adapters add to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules import module as hooks

from ..adapters.base import Host
from ..convolution.low_rank import Factors, stacked
from ..convolution.nodes import convolve
from ..errors import HostError
from .slots import Entry, Slots


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
            output = add_to_entry(own, output, slots.outputs.get(name), adapter)
    return output


def _update(layer: Any, adapter: Any, x: Tensor, own: Tensor) -> Tensor:
    """Return what a parallel adapter adds; one that reads its host is passed the layer's weight and output."""
    if adapter.reads_host:
        return adapter(x, Host(layer.weight, layer.bias, own))
    if adapter.site.geometry.transposed:  # its caller may have asked for an output size
        return adapter(x, output_size=own.shape[-2:])
    return adapter(x)


def add_to_entry(base: Any, output: Any, entry: Entry, function: Any) -> Any:
    """Return ``output`` with ``function(base)`` added, or to the one ``entry`` of it that is a tensor."""
    if entry is None:
        if not isinstance(output, (Tensor, Proxy)):
            raise HostError(
                f"the module returned a {type(output).__name__}, not a tensor: name the entry to adapt with "
                "'output: <index or key>' in the rule"
            )
        return output + function(base)
    index: Any = None if isinstance(output, Tensor) else entry_index(output, entry)
    if not _has_entry(output, index):
        raise HostError(
            f"the module returned a {type(output).__name__}, which has no entry {entry!r}: 'output' in the rule, or in the "
            "file, is for another module"
        )
    if isinstance(output, dict):
        changed = output.copy()
        changed[index] = output[index] + function(base[index])
        return changed
    entries = list(output)
    entries[index] = output[index] + function(base[index])
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


def _has_entry(output: Any, index: Any) -> bool:
    if isinstance(output, dict):
        return index in output
    if isinstance(output, (tuple, list)):
        return isinstance(index, int) and -len(output) <= index < len(output)
    return not isinstance(output, Tensor)


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
