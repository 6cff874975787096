"""Text features of class names: from a file, from CLIP if it is on this machine, else made from the names.

YOLO-World compares each place of the image with one 512-vector per class. With a pretrained ``--weights`` file those
vectors must come from the CLIP text encoder it was trained with. Without one, any fixed and distinct vectors do, as
long as the same name always gives the same vector; the third source below is for that case.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DIMENSION = 512
CLIP_NAME = "openai/clip-vit-base-patch32"


class TextError(ValueError):
    """Text features that are missing or have the wrong form."""


def features_from_name(name: str) -> Tensor:
    """Return the unit vector of a name, ``(512,)``: the same on every machine, another for every other name.

    It holds no meaning; two names are about at right angles, whatever they say.

    Example:
        >>> bool(torch.equal(features_from_name("stain"), features_from_name("stain")))
        True
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(DIMENSION)).float()
    return vector / vector.norm()


def features_from_file(path: Path) -> dict[str, Tensor]:
    """Return ``{name: (512,)}`` from a ``.safetensors`` file, or a ``.pt`` file read with ``weights_only=True``.

    Raises:
        TextError: if the file is missing, or anything in it is no 512-vector.
    """
    if not path.is_file():
        raise TextError(f"there is no text feature file {path}.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        table = load_file(path)
    else:
        table = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(table, dict) or not table:
        raise TextError(f"{path} must hold a dictionary from class name to a tensor of shape ({DIMENSION},).")
    for name, value in table.items():
        if not isinstance(value, Tensor) or value.numel() != DIMENSION or not bool(torch.isfinite(value).all()):
            raise TextError(f"{path}: '{name}' must be a finite tensor of shape ({DIMENSION},).")
    return {str(name): value.detach().float().reshape(DIMENSION) for name, value in table.items()}


def features_from_clip(names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return CLIP ViT-B/32's features of the names, or None where its weights are not on this machine.

    Nothing is downloaded: only a copy that an earlier program left in the local cache is used.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    if not any(
        isinstance(try_to_load_from_cache(CLIP_NAME, file), str) for file in ("model.safetensors", "pytorch_model.bin")
    ):
        return None
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    try:
        tokenizer = AutoTokenizer.from_pretrained(CLIP_NAME, local_files_only=True)
        encoder = CLIPTextModelWithProjection.from_pretrained(CLIP_NAME, local_files_only=True).eval()
    except OSError:
        return None
    with torch.no_grad():
        tokens = tokenizer([name.replace("_", " ") for name in names], padding=True, return_tensors="pt")
        vectors = encoder(**tokens).text_embeds
    return {name: vector / vector.norm() for name, vector in zip(names, vectors, strict=True)}


@dataclasses.dataclass(frozen=True)
class TextFeatures:
    """Features by class name, and a sentence that says where they come from."""

    table: dict[str, Tensor]
    source: str

    def of(self, classes: Sequence[str]) -> Tensor:
        """Return the features of some classes in their order, ``(1, number of classes, 512)``.

        Raises:
            TextError: if a class has no features.
        """
        missing = [name for name in classes if name not in self.table]
        if missing:
            raise TextError(
                f"no text features for {', '.join(missing)}; there are some for {', '.join(sorted(self.table))}."
            )
        return torch.stack([self.table[name] for name in classes])[None]


def load_texts(names: Sequence[str], path: Path | None = None, *, use_clip: bool = True) -> TextFeatures:
    """Return the features of all ``names``, from the first source there is, and say which it was.

    Args:
        names: every class name that will be asked for.
        path: file with features; then nothing else is tried.
        use_clip: look for CLIP in the local cache.

    Raises:
        TextError: if the file is unreadable or lacks a name.
    """
    wanted = sorted(set(names))
    if path is not None:
        features = TextFeatures(features_from_file(path), f"read from {path.name}")
        features.of(wanted)
        return features
    clip = features_from_clip(wanted) if use_clip else None
    if clip is not None:
        return TextFeatures(clip, f"CLIP text encoder {CLIP_NAME}, from the local cache")
    made = {name: features_from_name(name) for name in wanted}
    return TextFeatures(
        made, "made from the class names by a hash (no text encoder on this machine): fixed, but without meaning"
    )
