"""Give the tensors of a file to adapters and unfrozen modules: each is allocated once, as itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import hosting
from .adapters.base import Adapter
from .errors import AdapterFileError

_PLAIN = (str, int, float, complex, bool, bytes, type(None), type, torch.dtype, torch.Size)
Source = Callable[[str, Tensor, torch.device], Tensor]


def source_of(tensors: Mapping[str, Tensor], prefix: str, where: str, *, keep_dtype: bool) -> Source:
    """Return what makes the tensor of a name anew, given the one it replaces and a device.

    Args:
        tensors: of the file, by key.
        prefix: of the keys.
        where: the file, for messages.
        keep_dtype: take the dtype of the file and not that of the tensor that is replaced.
    """

    def source(name: str, old: Tensor, device: torch.device) -> Tensor:
        saved = tensors[prefix + name]
        made = saved.to(device, saved.dtype if keep_dtype else old.dtype, copy=True)
        if made.dtype != saved.dtype and not torch.equal(made.isfinite().cpu(), saved.isfinite()):
            raise AdapterFileError(f"{where}: {prefix}{name} overflows {made.dtype}; the model is unchanged")
        return made

    return source


def furnish(draft: Adapter, real: Callable[[], Adapter], source: Source, device: torch.device) -> Adapter:
    """Return an adapter with the tensors of a file: the draft itself, or a real one where the draft holds more than those.

    Args:
        draft: on the meta device.
        real: makes the same adapter on ``device``; for kinds with state of their own that no file carries.
        source: of its tensors, by their names in its ``state_dict``.
        device: of the host.
    """
    if not _is_its_state_dict(draft):
        adapter = real()
        for name, old in adapter.state_dict(keep_vars=True).items():
            old.data = source(name, old, device)
        return adapter
    replaced: dict[int, Tensor] = {}
    for name, old in draft.state_dict(keep_vars=True).items():
        if id(old) not in replaced:
            replaced[id(old)] = _like(old, source(name, old, device))
    for module in draft.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            store.update({key: replaced[id(old)] for key, old in store.items() if id(old) in replaced})
    return draft


def furnished_drawer(shown: Mapping[str, Tensor], source: Source, copies: dict[int, Tensor]) -> hosting.Tensors:
    """Return a module's own tensors as a file has them.

    Args:
        shown: those of the base, by name.
        source: of the tensors.
        copies: what was made before, by ``id`` of the base's tensor; a tensor that two modules share stays one.
    """
    drawer = hosting.Tensors()
    for name, old in shown.items():
        if id(old) not in copies:
            made = source(name, old, old.device)
            copies[id(old)] = nn.Parameter(made, made.is_floating_point()) if isinstance(old, nn.Parameter) else made
        store: dict[str, Any] = drawer._parameters if isinstance(old, nn.Parameter) else drawer._buffers
        store[name] = copies[id(old)]
    return drawer


def _like(old: Tensor, made: Tensor) -> Tensor:
    return nn.Parameter(made, old.requires_grad) if isinstance(old, nn.Parameter) else made


def _is_its_state_dict(adapter: Adapter) -> bool:
    """Whether an adapter has nothing that its ``state_dict`` lacks: other buffers, tensors in attributes, marks or hooks on tensors."""
    known = {id(tensor) for tensor in adapter.state_dict(keep_vars=True).values()}
    return all(id(t) in known and _is_bare(t) for t in (*adapter.parameters(), *adapter.buffers())) and all(
        _is_plain(value)
        for module in adapter.modules()
        for key, value in module.__dict__.items()
        if key not in ("_parameters", "_buffers", "_modules")
    )


def _is_bare(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.__dict__ and not tensor._backward_hooks


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, each.name)) for each in fields(value))
    return isinstance(value, _PLAIN)
