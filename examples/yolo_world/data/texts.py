"""Class texts and their features: from a file, from CLIP if it is on this machine, else made from the names.

YOLO-World compares each place of the image with one 512-vector per class. With a pretrained ``--weights`` file those
vectors must come from the CLIP text encoder it was trained with. Without one, any fixed and distinct vectors do, as
long as the same name always gives the same vector; the third source below is for that case.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class ClassTexts:
    """The classes in order, each by its texts: the first is the class's name, the others are synonyms.

    Example:
        >>> texts = ClassTexts((("defect", "flaw"), ("coil",)))
        >>> texts.names, texts.index_of("flaw"), texts.index_of("dust")
        (('defect', 'coil'), 0, None)
    """

    synonyms: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(texts[0] for texts in self.synonyms)

    def index_of(self, text: str) -> int | None:
        """Return the class that a name or synonym belongs to, or None."""
        return next((index for index, texts in enumerate(self.synonyms) if text in texts), None)


def class_texts(entries: Any, where: str = "the class texts") -> ClassTexts:
    """Return the classes of a list such as ``[["defect"], ["coil", "spool"]]``, in its order.

    A plain string stands for a list of one. Space around a text is taken off.

    Args:
        entries: the list.
        where: what the entries were read from, for errors.

    Raises:
        TextError: if it is no such list, is empty, has a blank text, or the same text twice.
    """
    form = 'a list with one list of texts per class, such as [["defect"], ["coil", "spool"]]'
    if not isinstance(entries, list | tuple) or not entries:
        raise TextError(f"{where} must be {form}.")
    found: list[tuple[str, ...]] = []
    for index, entry in enumerate(entries):
        texts = [entry] if isinstance(entry, str) else entry
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise TextError(f"{where}: class {index} is {json.dumps(entry, default=repr)[:80]}; it must be {form}.")
        if not all(text.strip() for text in texts):
            raise TextError(f"{where}: class {index} has a blank text; name what it shows.")
        found.append(tuple(text.strip() for text in texts))
    flat = [text for texts in found for text in texts]
    twice = sorted({text for text in flat if flat.count(text) > 1})
    if twice:
        raise TextError(
            f"{where} has {', '.join(map(repr, twice))} more than once; a text can belong to one class only."
        )
    return ClassTexts(tuple(found))


def load_class_texts(path: Path) -> ClassTexts:
    """Return the classes of a JSON file such as ``[["defect"], ["coil", "spool"]]``, in its order.

    Raises:
        TextError: if the file is missing, is no JSON, or holds something else (see ``class_texts``).
    """
    if not path.is_file():
        raise TextError(f"there is no class text file {path}.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise TextError(f"{path} is no JSON: {error}.") from error
    return class_texts(entries, str(path))


def encode_texts(names: Sequence[str], source: str, *, local: bool) -> dict[str, Tensor]:
    """Return the unit features of some texts from a CLIP text encoder in transformers' form.

    Args:
        names: the texts; an underscore is read as a space.
        source: folder with weights and tokenizer, or a model's name in the local cache.
        local: whether ``source`` is a folder, for errors.

    Raises:
        OSError: if files are missing.
        TextError: if the weights are no CLIP text encoder with 512 features, or a text is too long for it.
    """
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    encoder, found = CLIPTextModelWithProjection.from_pretrained(
        source, local_files_only=True, output_loading_info=True
    )
    place = f"the folder {source}" if local else source
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise TextError(
            f"{place} holds no whole CLIP text encoder: {len(missing)} tensors are missing, {missing[0]} for one. "
            f"Give a copy of {CLIP_NAME}."
        )
    width = encoder.text_projection.out_features
    if width != DIMENSION:
        raise TextError(f"{place} gives {width} features per text, YOLO-World takes {DIMENSION}: use {CLIP_NAME}.")
    tokens = tokenizer([name.replace("_", " ") for name in names], padding=True, return_tensors="pt")
    length, longest = tokens["input_ids"].shape[1], encoder.config.max_position_embeddings
    if length > longest:
        raise TextError(f"a class text has {length} tokens, {place} reads {longest}: {max(names, key=len)[:60]!r} ...")
    with torch.no_grad():
        vectors = encoder.eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds
    vectors = vectors.float()
    return {name: vector / vector.norm() for name, vector in zip(names, vectors, strict=True)}


def features_from_clip(names: Sequence[str], folder: Path | None = None) -> dict[str, Tensor] | None:
    """Return CLIP ViT-B/32's features of the names, or None where its weights are not on this machine.

    Nothing is downloaded: only ``folder``, or a copy that an earlier program left in the local cache, is used.

    Args:
        names: the texts.
        folder: weights, configuration and tokenizer as transformers saves them.

    Raises:
        TextError: if ``folder`` is given and cannot be used.
    """
    if folder is not None:
        return features_from_folder(names, folder)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    if not any(
        isinstance(try_to_load_from_cache(CLIP_NAME, file), str) for file in ("model.safetensors", "pytorch_model.bin")
    ):
        return None
    try:
        return encode_texts(names, CLIP_NAME, local=False)
    except (ImportError, OSError):
        return None


def features_from_folder(names: Sequence[str], folder: Path) -> dict[str, Tensor]:
    """Return the features of the names from a CLIP in a folder.

    Raises:
        TextError: if the folder is missing or holds no CLIP text encoder with its tokenizer, or there is no transformers.
    """
    if not folder.is_dir():
        raise TextError(f"there is no folder {folder}; --clip wants a copy of {CLIP_NAME} as transformers saves it.")
    try:
        return encode_texts(names, str(folder), local=True)
    except TextError:
        raise
    except ImportError as error:
        raise TextError(f"--clip needs the package transformers: {error}.") from error
    except Exception as error:  # what transformers raises on a strange folder differs from file to file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TextError(f"{folder} cannot be read as a CLIP text encoder with its tokenizer: {text}") from error


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


def load_texts(
    names: Sequence[str], path: Path | None = None, *, use_clip: bool = True, clip: Path | None = None
) -> TextFeatures:
    """Return the features of all ``names``, from the first source there is, and say which it was.

    Args:
        names: every class name that will be asked for.
        path: file with features; then nothing else is tried.
        use_clip: look for CLIP in the local cache.
        clip: folder with CLIP; then the cache is not looked at.

    Raises:
        TextError: if the file is unreadable or lacks a name, or the folder is no CLIP text encoder.
    """
    wanted = sorted(set(names))
    if path is not None and clip is not None:
        raise TextError(f"two sources of text features are given, {path} and {clip}; take one.")
    if path is not None:
        features = TextFeatures(features_from_file(path), f"read from {path.name}")
        features.of(wanted)
        return features
    found = features_from_clip(wanted, clip) if use_clip or clip is not None else None
    if found is not None:
        where = f"from the folder {clip}" if clip is not None else f"{CLIP_NAME}, from the local cache"
        return TextFeatures(found, f"CLIP text encoder {where}")
    made = {name: features_from_name(name) for name in wanted}
    return TextFeatures(
        made, "made from the class names by a hash (no text encoder on this machine): fixed, but without meaning"
    )


def mean_direction(vectors: Tensor) -> Tensor:
    """Return the unit vector along the mean of the unit vectors of ``(n, 512)``.

    A single vector of length 1 comes back bit for bit.

    Raises:
        TextError: if a vector is zero or the directions cancel out.
    """
    lengths = vectors.double().norm(dim=1, keepdim=True)
    if len(vectors) == 1 and abs(float(lengths) - 1) < 1e-6:
        return vectors[0]
    mean = (vectors.double() / lengths).mean(0)
    if not bool((lengths > 0).all()) or float(mean.norm()) < 1e-6:
        raise TextError("text features that are zero, or cancel each other out, give no direction.")
    return (mean / mean.norm()).float()


def load_class_features(
    classes: ClassTexts,
    path: Path | None = None,
    *,
    use_clip: bool = True,
    clip: Path | None = None,
    others: Sequence[str] = (),
) -> TextFeatures:
    """Return the features of classes by their names, each the mean direction of its texts, and say so.

    The vectors of a class's texts are each brought to length 1, averaged, and the mean to length 1 again.

    Args:
        classes: the classes with their synonyms.
        path, use_clip, clip: see ``load_texts``.
        others: further names, with features of their own; a class of the same name comes first.

    Raises:
        TextError: see ``load_texts``; or if the texts of a class cancel each other out.
    """
    texts = [text for entry in classes.synonyms for text in entry]
    found = load_texts([*texts, *others], path, use_clip=use_clip, clip=clip)
    table = {name: found.table[name] for name in others}
    for entry in classes.synonyms:
        try:
            table[entry[0]] = mean_direction(found.of(entry)[0])
        except TextError as error:
            raise TextError(f"class '{entry[0]}' ({', '.join(entry)}): {error}") from error
    several = [f"{entry[0]} ({len(entry)})" for entry in classes.synonyms if len(entry) > 1]
    source = found.source + (f"; mean of the synonyms' directions for {', '.join(several)}" if several else "")
    return TextFeatures(table, source)
