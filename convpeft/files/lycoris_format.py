"""LoCon files as LyCORIS and kohya's scripts write them, both ways: LoRA by module names with underscores.

Format: LyCORIS 4 (https://github.com/KohakuBlueleaf/LyCORIS), whose keys are ``<prefix>_<module>.lora_down.weight``,
``.lora_up.weight``, ``.lora_mid.weight`` and ``.alpha``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..adapters.base import Adapter
from ..convolution.geometry import ConvGeometry
from ..convolution.kernels import embed_on_grid
from ..convolution.precision import floating_dtype
from ..errors import AdapterFileError, ConvPeftError, HostError, brief, shortened
from ..hosts.model import AdaptedModel, whole
from ..hosts.modules import unique_modules
from ..hosts.slots import base_class
from ..hosts.trainers import guard_trainers
from ..hosts.transaction import with_normal_tensors
from ..hosts.wrappers import refuse_parallel
from ..injection.install import check_name, install
from ..injection.switching import note_training
from ..injection.values import Given, prepare
from ..planning.plan import Plan
from .fingerprints import plain
from .reading import opened
from .saving import chosen
from .writing import write

PREFIX = "lycoris"
_KNOWN = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha")
_MOST_NAMED = 12  # problems in one error


@with_normal_tensors
def from_lycoris(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    prefix: str = PREFIX,
    lean: bool = True,
    dtype: torch.dtype | str | None = None,
) -> Plan:
    """Put the adapter of a LoCon file into the model in place, make it the active one, and return what it adapts.

    It becomes the kind ``lora``; Tucker factors (``lora_mid``) are multiplied out. All or nothing. A file of LyCORIS says
    nothing of its base: load the base's weights first.

    Args:
        model: the base the adapter was trained on.
        path: of the safetensors file.
        name: to give it here.
        prefix: of the keys: LyCORIS' is ``lycoris``, kohya's ``lora_unet`` or ``lora_te``.
        lean, dtype: see ``from_peft``.

    Raises:
        AdapterFileError: if the file is damaged, does not fit, or has what is no LoRA (LoHa, LoKr, DoRA).
        StateError: if the name is taken.
    """
    path, root, wanted = Path(path), whole(model), floating_dtype(dtype)
    check_name(root, name)
    refuse_parallel(root)
    guard_trainers(map(type, root.modules()))
    with opened(path) as source:
        tensors = source.read()
    modules = dict(unique_modules(root))
    layers = _by_flat_name(modules, prefix)
    found: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        flat, _, rest = key.partition(".")
        names = layers.get(flat, [])
        if len(names) != 1:
            why = (
                f"the name of {shortened(names)}" if names else f"of no layer of this model with the prefix {prefix!r}"
            )
            problems.append(f"{brief(key)} is {why}")
        else:
            found.setdefault(names[0], {})[rest] = tensor
    given = {}
    for layer, own in found.items():
        try:
            given[layer] = _given(layer, modules[layer], own)
        except ConvPeftError as error:
            problems.append(str(error))
    if problems or not given:
        raise AdapterFileError(
            f"{path} cannot be read as it was meant; the model is unchanged. {_listed(problems or ['it has no tensors'])}"
        )
    prepared = prepare(root, given, {}, heading=str(path), error=AdapterFileError, dtype=wanted)
    install(root, name, prepared.record, prepared.built, lean=lean)
    return prepared.plan


def _by_flat_name(modules: Mapping[str, nn.Module], prefix: str) -> dict[str, list[str]]:
    """Return the names of modules by the one that they have in a file; two may have the same."""
    found: dict[str, list[str]] = {}
    for name in modules:
        found.setdefault(_flat(name, prefix), []).append(name)
    return found


def _flat(name: str, prefix: str) -> str:
    return f"{prefix}_{name}".replace(".", "_")


def _refusal(geometry: ConvGeometry) -> str | None:
    """Return why LyCORIS computes something else on a layer than the convolution with a changed weight, or None."""
    if geometry.transposed:
        return "LyCORIS has no LoCon for transposed convolutions"
    if geometry.padding_mode != "zeros" and any(geometry.padding):
        return f"LyCORIS pads with zeros where the layer pads by {geometry.padding_mode!r}"
    if geometry.dynamic_kernel not in (None, (1, 1)):
        return "LyCORIS does not know TensorFlow's same padding"
    return None


def _given(layer: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Given:
    """Return the adapter of kind ``lora`` that a LoCon module is.

    Raises:
        ConvPeftError: if it is none, or of other shapes than the layer asks for.
    """
    strange = [key for key in tensors if key not in _KNOWN]
    if strange or not {"lora_down.weight", "lora_up.weight"} <= set(tensors):
        what = f"{brief(strange[0])} is of no LoCon" if strange else "lora_down or lora_up is missing"
        raise ConvPeftError(f"{layer}: {what}")
    try:
        geometry = ConvGeometry.of(module)
    except ConvPeftError as error:
        raise ConvPeftError(f"{layer}: {error}") from error
    refusal = _refusal(geometry)
    if refusal:
        raise ConvPeftError(f"{layer}: {refusal}")
    down, up = (tensors[key] for key in ("lora_down.weight", "lora_up.weight"))
    down, up = (each[..., None, None] if each.ndim == 2 else each for each in (down, up))
    mid = tensors.get("lora_mid.weight")
    if mid is not None and mid.ndim == 4 and down.shape[2:] == (1, 1) and mid.shape[1] == down.shape[0]:
        down = torch.einsum("rskl,si->rikl", mid.double(), down[:, :, 0, 0].double()).to(down.dtype)
    rank = down.shape[0]
    expected = (rank, geometry.in_per_group, *geometry.kernel_size), (geometry.out_channels, rank, 1, 1)
    if (tuple(down.shape), tuple(up.shape)) != expected:
        raise ConvPeftError(
            f"{layer}: lora_down is {tuple(down.shape)} and lora_up {tuple(up.shape)}; rank {rank} makes {expected[0]} and "
            f"{expected[1]} here"
        )
    alpha = tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ConvPeftError(f"{layer}: alpha has {alpha.numel()} numbers")
    scale = 1.0 if alpha is None or float(alpha) == 0 else float(alpha) / rank
    down, up, rank = _in_groups(down, up, geometry)
    if scale < 0:
        scale, up = -scale, -up
    return Given("lora", {"rank": rank, "alpha": scale * rank}, {"down": down, "up": up})


def _in_groups(down: Tensor, up: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor, int]:
    """Return the factors of a ``lora`` on a grouped layer, and its rank: every group has its own copy of A.

    LyCORIS lets all groups share one A. Where its rank is above a group's output channels, the product takes the place
    of A, and B is the identity of each group.
    """
    groups, out = geometry.groups, geometry.out_per_group
    if groups == 1:
        return down, up, down.shape[0]
    if down.shape[0] <= out:
        return down.repeat(groups, 1, 1, 1), up, down.shape[0] * groups
    product = (up[:, :, 0, 0].double() @ down.double().flatten(1)).reshape(-1, *down.shape[1:]).to(down.dtype)
    return product, torch.eye(out, dtype=up.dtype).repeat(groups, 1)[:, :, None, None], out * groups


def to_lycoris(model: nn.Module, path: str | Path, *, name: str | None = None, prefix: str = PREFIX) -> Path:
    """Write one adapter of kind ``lora`` as a LoCon file that LyCORIS loads, and return its path.

    Args:
        model: an injected model.
        path: of the file; its folder is made if need be.
        name: of the adapter; unset, the only one, or the only active one.
        prefix: of the keys, see ``from_lycoris``.

    Raises:
        HostError: if LoCon cannot express the adapter, or LyCORIS would compute something else; the text says which layers.
        StateError: if nothing is injected, or it is not clear which adapter is meant.
        AdapterFileError: if the file cannot be written.
    """
    adapted = AdaptedModel.of(model)
    name = chosen(adapted, name)
    record, adapters = adapted.record(name), dict(adapted.adapters(name))
    note_training(adapted)
    layers = _by_flat_name(dict(unique_modules(adapted.root)), prefix)
    problems = []
    if record.owned:
        problems.append(f"it unfreezes {shortened(list(record.owned))}, and a LoCon file has no such tensors")
    for layer, adapter in adapters.items():
        problems += [f"{layer}: {why}" for why in _inexpressible(adapter, adapted.module(layer))]
        if len(layers[_flat(layer, prefix)]) > 1:
            problems.append(f"{shortened(layers[_flat(layer, prefix)])} would have the same name in the file")
    if problems:
        raise HostError(f"adapter {name!r} cannot be written as LoCon; nothing was written. {_listed(problems)}")
    tensors = {
        f"{_flat(layer, prefix)}.{key}": plain(tensor).clone()
        for layer, adapter in adapters.items()
        for key, tensor in _tensors(adapter)
    }
    path = Path(path)
    write(path, safetensors_bytes(tensors, {"ss_network_module": "lycoris.kohya"}))
    return path


def _inexpressible(adapter: Adapter, module: nn.Module) -> Iterator[str]:
    if adapter.kind != "lora" or adapter.site.place == "output":
        yield f"kind {adapter.kind!r} on its {'output' if adapter.site.place == 'output' else 'side'} is no LoCon"
        return
    if adapter.options.dora or adapter.options.bias:
        yield "DoRA and a bias are no LoCon"
    own = base_class(module)
    if not (issubclass(own, nn.Linear) or (issubclass(own, nn.Conv2d) and own.__init__ is nn.Conv2d.__init__)):
        yield f"LyCORIS takes Linear and what is built like Conv2d, and this is a {own.__name__}"
    refusal = _refusal(adapter.site.geometry)
    if refusal:
        yield refusal


def _tensors(adapter: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a LoCon module. All groups share A there: B is zero where it would read another group's rows."""
    geometry = adapter.site.geometry
    down, up = adapter.down.detach(), adapter.up.detach()
    if down.shape[2:] != geometry.kernel_size:  # pointwise
        down = embed_on_grid(down, geometry.kernel_size, geometry.kernel_size)
    if geometry.groups > 1:
        up = torch.block_diag(*[block.flatten(1) for block in up.chunk(geometry.groups)])[..., None, None]
    yield "lora_down.weight", down.flatten(1) if geometry.linear else down
    yield "lora_up.weight", up.flatten(1) if geometry.linear else up
    yield (
        "alpha",
        torch.tensor(
            adapter.scale * down.shape[0], dtype=torch.float64 if down.dtype == torch.float64 else torch.float32
        ),
    )


def _listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
    return "; ".join(map(brief, problems[:_MOST_NAMED])) + more
