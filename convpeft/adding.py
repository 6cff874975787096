"""How the parts of active adapters come to a module's own output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as hooks

from .errors import HostError
from .lean import convolve
from .low_rank import Factors, together


class Host(NamedTuple):
    """The layer an adapter sits beside, lent for one call: by reference, never kept and never registered.

    Attributes:
        weight: of the layer, as it is shown now (a base checkpoint loaded since, an adapter's own unfrozen values, ...).
        bias: of the layer, or None.
        output: what the layer itself made of this very input, without any adapter.
    """

    weight: Tensor
    bias: Tensor | None
    output: Tensor


def convolved(layer: Any, x: Any, adapters: Mapping[str, Any], lean: bool) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return what a ``Conv2d`` makes of ``x`` with the low-rank updates beside it, and the names of adapters still to be added.

    None instead of an output: the layer's own forward has to run, and all adapters are still to be added. So it is where one of
    them reads the layer's bare output, and for an adapter that somebody hooked, or while modules are hooked globally: a hook
    sees forward passes.
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
    return convolve(layer, x, together(factors) if factors else None, lean), left


def update(layer: nn.Module, adapter: nn.Module, x: Tensor, own: Tensor) -> Tensor:
    """Return what a parallel adapter adds to its layer's output.

    Args:
        layer: the host.
        adapter: beside it.
        x: the layer's input.
        own: what the layer itself makes of ``x``; lent, with the layer's weight, to an adapter that reads its host.
    """
    if adapter.reads_host:
        return adapter(x, Host(layer.weight, layer.bias, own))  # type: ignore[arg-type]
    if adapter.site.geometry.transposed:  # type: ignore[union-attr]  # its caller may have asked for an output size
        return adapter(x, output_size=own.shape[-2:])
    return adapter(x)


def add_to_entry(base: Any, output: Any, entry: int | str | None, function: Any) -> Any:
    """Return ``output`` with ``function(base)`` added, or to the one ``entry`` of it that is a tensor."""
    if entry is None:
        if not isinstance(output, (Tensor, Proxy)):
            raise HostError(
                f"the module returned a {type(output).__name__}, not a tensor: name the entry to adapt with "
                "'output: <index or key>' in the rule"
            )
        return output + function(base)
    index = located(output, entry)
    if isinstance(output, dict):
        changed = output.copy()
        changed[index] = output[index] + function(base[index])
        return changed
    entries = list(output)
    entries[index] = output[index] + function(base[index])
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


def located(output: Any, entry: int | str) -> Any:
    """Return the index or key of an output's entry; a namedtuple's may be given by field, a ModelOutput's by index."""
    if isinstance(entry, int) and hasattr(output, "to_tuple") and entry not in output:
        return list(output)[entry]
    return output._fields.index(entry) if isinstance(entry, str) and hasattr(output, "_fields") else entry
