"""Adapters of files without a model: each file open, its tensors checked against its kinds, its adapters built from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.base import Adapter, Site
from ..adapters.options import read_options
from ..adapters.registry import adapter_class, make_adapter
from ..convolution.geometry import ConvGeometry
from ..errors import AdapterConflict, AdapterFileError, SpecError, brief
from .dtypes import fitted
from .header import ADAPTER, OWN, STATE, AdapterFile, described, tensor_key
from .loading import read_tensors, unlike_its_tensors
from .reading import opened


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter file in memory: what it says, and its tensors, whose digest was right.

    Attributes:
        path: of the file.
        file: what it says of itself.
        tensors: by key in the file.
        coefficient: that its update is multiplied with.
    """

    path: Path
    file: AdapterFile
    tensors: Mapping[str, Tensor]
    coefficient: float = 1.0

    def changed(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield module, name and value of each tensor that it brings for the base's: unfrozen ones, and buffers that moved."""
        for key, tensor in self.tensors.items():
            part, _, rest = key.partition(":")
            if part in (OWN, STATE):
                module, _, name = rest.rpartition(":")
                yield module, name, tensor

    def adapter(self, layer: str, old: torch.dtype, *, keep: bool = True) -> Adapter:
        """Return the adapter of a layer with the file's values, as loading it would make it.

        Args:
            layer: its name.
            old: dtype of the layer.
            keep: the file's dtype, see ``dtypes.fitted``.

        Raises:
            AdapterFileError: if the file's tensors are not those of the adapter that it names.
        """
        record = self.file.layers[layer]
        site = Site(record.place, ConvGeometry.from_dict(record.geometry))  # type: ignore[arg-type]
        try:
            kind = adapter_class(record.kind)
            options, problems = read_options(record.kind, kind.Options, record.options)
        except SpecError as error:
            raise AdapterFileError(f"{self.path}: {layer}: {error}") from error
        if options is None or problems:
            raise AdapterFileError(f"{self.path}: {layer}: {'; '.join(map(str, problems))}")
        unlike = unlike_its_tensors(self.file, layer, site, options)
        refusal = unlike or kind.refuses(site, options)
        if refusal:
            raise AdapterFileError(f"{self.path}: {layer} cannot take kind {record.kind!r}: {refusal}")
        with torch.random.fork_rng(devices=[]):
            adapter = make_adapter(record.kind, site, options, "cpu").to(dtype=old).eval()
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            name = tensor_key(ADAPTER, layer, key)
            try:
                tensor.data = fitted(self.tensors[name], tensor.dtype, keep)
            except AdapterFileError as error:
                raise AdapterFileError(f"{self.path}: {name} {error}") from None
        expected = {tensor_key(ADAPTER, layer, key) for key in adapter.state_dict()}
        strange = [key for key in self.tensors if key.startswith(f"{ADAPTER}:{layer}:") and key not in expected]
        if strange:
            raise AdapterFileError(f"{self.path}: {brief(strange[0])} is not expected")
        return adapter


@contextmanager
def stored_adapters(
    paths: Sequence[Path], coefficients: Sequence[float], *, apart: bool = False
) -> Iterator[list[StoredAdapter]]:
    """Give the adapters of files inside the context.

    Args:
        paths, coefficients: of the files.
        apart: they need not be able to be active together.

    Raises:
        AdapterFileError: if one is damaged.
        AdapterConflict: if two of them bring their own values of the same tensors.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)) for path in paths]
        found = []
        for path, source, coefficient in zip(paths, sources, coefficients, strict=True):
            file = described(source)
            found.append(StoredAdapter(path, file, read_tensors(source, file), coefficient))
        if not apart:
            _check_owners(found)
        yield found


def _check_owners(stored: Sequence[StoredAdapter]) -> None:
    owner: dict[str, StoredAdapter] = {}
    for each in stored:
        for module in dict.fromkeys(module for module, _, _ in each.changed()):
            if module in owner:
                raise AdapterConflict(
                    f"{owner[module].path} and {each.path} both bring their own tensors of {module!r}, so they cannot be merged "
                    "together: train them with adapters only (no unfreeze there)."
                )
            owner[module] = each
