"""Adapters in folders and repositories as the Hugging Face Hub has them: a file, and a model card with its numbers.

``huggingface_hub`` is imported when a repository is asked for, and for nothing else.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ..errors import AdapterFileError, OptionError, brief, shown
from ..hosts.model import AdaptedModel
from ..hosts.slots import base_class
from ..injection.training import summary
from .header import ADAPTER, AdapterFile, inspect_adapter
from .loading import load_adapter
from .reading import DTYPES
from .saving import save_adapter
from .writing import write

FILE, CARD = "adapter.safetensors", "README.md"
_MARK = "<!-- written by convpeft -->"  # a card that has it may be written anew


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Write one adapter to a folder as ``adapter.safetensors``, with a model card ``README.md``, and return the path of the folder.

    The card says what is in the file: kinds, layers, parameters, and how to load it. A card without the line
    ``written by convpeft`` is somebody's own and is left as it is.

    Args:
        model: an injected model.
        folder: made if need be.
        name: of the adapter; unset, the only one, or the only active one.
        base_model: identifier of the base, for the card; an adapter file itself knows its base by digests.
        details: further entries of the card's metadata, such as ``license`` or ``tags``.

    Raises:
        StateError: as ``save_adapter`` does.
        AdapterFileError: if a file cannot be written.
    """
    folder = Path(folder)
    card = folder / CARD
    if details is not None and not isinstance(details, Mapping):
        raise OptionError(f"details must map entries of the card's metadata to values, not {shown(details)}")
    path = save_adapter(model, folder / FILE, name=name)
    try:
        ours = not card.exists() or _MARK in card.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{card} cannot be read: {error}") from error
    if ours:
        text = card_text(inspect_adapter(path), path.stat().st_size, _of_base(model), base_model, details or {})
        write(card, text.encode())
    return folder


def from_pretrained(
    model: nn.Module,
    source: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    any_base: bool = False,
    lean: bool = True,
    dtype: torch.dtype | str | None = None,
) -> AdapterFile:
    """Put the adapter of a folder, or of a repository on the Hub, into the model in place, and return what its file says.

    Args:
        model: the base the adapter was trained on.
        source: a folder with ``adapter.safetensors``; else the identifier of a repository, ``owner/name``, whose file is
            fetched, or taken from the local cache, by ``huggingface_hub``.
        revision: branch, tag or commit of the repository.
        token: for the Hub, see ``huggingface_hub.hf_hub_download``.
        name, any_base, lean, dtype: see ``load_adapter``.

    Raises:
        AdapterFileError: if there is no such folder or repository, or the file is damaged or does not fit.
        BaseMismatch: if the base has other weights.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / FILE
    else:
        hub = _hub()
        try:
            path = Path(hub.hf_hub_download(str(source), FILE, revision=revision, token=token))
        except (OSError, ValueError) as error:  # the Hub's own errors are of these two
            raise AdapterFileError(
                f"{source} is no folder here, and {FILE} cannot be had from a repository of that name: {brief(str(error))}"
            ) from error
    return load_adapter(model, path, name=name, any_base=any_base, lean=lean, dtype=dtype)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    name: str | None = None,
    base_model: str | None = None,
    details: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | bool | None = None,
    message: str = "Upload adapter",
) -> str:
    """Upload one adapter and its model card to a repository on the Hub, made if need be, and return the commit's address.

    Args:
        model: an injected model.
        repo_id: ``owner/name``.
        name, base_model, details: see ``save_pretrained``. The card in the repository is replaced.
        private: make a private repository, if it has to be made.
        token: for the Hub.
        message: of the commit.

    Raises:
        OptionError: if ``huggingface_hub`` is not installed.
        Exception: whatever ``huggingface_hub`` raises.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, name=name, base_model=base_model, details=details)
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(getattr(done, "commit_url", done))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise OptionError(
            f"repositories on the Hub need the package huggingface_hub, which cannot be imported: {error}. "
            "pip install convpeft[hub]"
        ) from error
    return huggingface_hub


def _of_base(model: nn.Module) -> tuple[str, int]:
    """Return the class of a base and how many parameters it has."""
    return base_class(AdaptedModel.of(model).root).__name__, summary(model).base_parameters


def card_text(
    file: AdapterFile, size: int, base: tuple[str, int], base_model: str | None, details: Mapping[str, Any]
) -> str:
    """Return the model card of an adapter file.

    Args:
        file: what it says of itself.
        size: bytes of the file.
        base: class and parameters of the base.
        base_model: its identifier, if it has one.
        details: further metadata.
    """
    kinds = Counter(layer.kind for layer in file.layers.values())
    tags = ["convpeft", "adapter", *sorted(kinds)]
    said: dict[str, Any] = {"library_name": "convpeft", **({"base_model": base_model} if base_model else {}), **details}
    said["tags"] = [*tags, *(tag for tag in details.get("tags") or () if tag not in tags)]
    counts: Counter[str] = Counter()
    for key, (shape, dtype) in file.tensors.items():
        if DTYPES[dtype].is_floating_point:
            counts[key.partition(":")[0]] += math.prod(shape)
    total = sum(counts.values())
    rows = [
        ("base", f"{base_model or base[0]}, {base[1]:,} parameters"),
        ("adapters", ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items())) or "none"),
        ("numbers in adapters", f"{counts[ADAPTER]:,}"),
        ("numbers in unfrozen modules", f"{total - counts[ADAPTER]:,} in {len(file.owned)} modules"),
        ("together", f"{total:,} = {100 * total / max(1, base[1]):.2f} % of the base"),
        ("file", f"{size:,} bytes, content {file.content}"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    spec = yaml.safe_dump(file.spec, sort_keys=False, allow_unicode=True).rstrip()
    return f"""---
{yaml.safe_dump(said, sort_keys=False, allow_unicode=True).rstrip()}
---
{_MARK}

# {file.name}

An adapter for {base_model or f"a {base[0]}"}, made with convpeft. It fits the base with the very weights it was trained on; any other
is refused when it is loaded.

| | |
| --- | --- |
{table}

## How to load it

```python
import convpeft

convpeft.from_pretrained(model, "owner/name")  # model: the base, with its weights; or a folder instead of a repository
```

## Spec

```yaml
{spec}
```
"""
