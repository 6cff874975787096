"""The user's modules: all of them by name, what they are like, and copies of them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .slots import SLOT, base_class, slots_of
from .wrappers import named_inside

Module = TypeVar("Module", bound=nn.Module)


def base_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module of the user's with its name, all names of a shared one, none of convpeft's.

    Wrappers (``torch.compile``'s, DDP) are left out, and so are the parts of names that come from them.
    """
    mark = f".{SLOT}."
    found = [
        (name, module)
        for name, module in root.named_modules(remove_duplicate=False)
        if mark not in f".{name}." or not _is_ours(root, name)
    ]
    return named_inside(found)


def unique_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the user's modules, each once, under its first name."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in base_modules(root):
        found.setdefault(id(module), (name, module))
    return list(found.values())


def _is_ours(root: nn.Module, name: str) -> bool:
    """Return whether a name with a part ``convpeft`` leads into our child (a user may have a module of that name)."""
    module: nn.Module = root
    for part in name.split("."):
        if part == SLOT and slots_of(module) is not None:
            return True
        child = module._modules.get(part)
        if child is None:
            return False
        module = child
    return False


def is_within(name: str, above: str) -> bool:
    """Return whether a module name is ``above`` itself or a name below it; everything is within the root, ``""``.

    Example:
        >>> is_within("neck.conv.1", "neck.conv"), is_within("neck.conv2", "neck.conv"), is_within("neck", "")
        (True, False, True)
    """
    return not above or name == above or name.startswith(above + ".")


def is_batchnorm_like(module: nn.Module) -> bool:
    """Return whether the module keeps running statistics that training changes (BatchNorm, SyncBN, timm's)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    buffers = dict(module._buffers.items())  # a TorchScript module has no dict here
    return all(buffers.get(name) is not None for name in ("running_mean", "running_var"))


def is_sequence(module: nn.Module) -> bool:
    """Return whether a module runs its children in turn, as ``nn.Sequential`` itself does, and has any."""
    return getattr(base_class(module), "forward", None) is nn.Sequential.forward and len(module) > 0  # type: ignore[arg-type]


def last_step(name: str, module: Any) -> tuple[str, nn.Module]:
    """Return the module whose output is that of a Sequential, with its name: the last step, of the last step, ..."""
    while is_sequence(module):
        step = [key for key in module._modules if key != SLOT][-1]
        name = f"{name}.{step}" if name else step
        module = module._modules[step]
    return name, module


def device_and_dtype(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of the first floating parameter or buffer of the user's, torch's defaults without any."""
    for module in modules:
        parts = [part for _, part in base_modules(module)]
        for tensors in ([part._parameters for part in parts], [part._buffers for part in parts]):
            for tensor in (tensor for own in tensors for tensor in own.values()):
                if tensor is not None and tensor.is_floating_point():
                    return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
