"""Class texts with synonyms, and their features by transformers' CLIP: a tiny one, built here from its configuration."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("ultralytics")

from examples.yolo_world.data import texts  # noqa: E402

WORDS = ("defect", "coil", "spool", "dust", "missing", "part")


def test_the_list_as_users_have_it(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('[["defect"], ["coil", " spool "], "dust"]', encoding="utf-8")
    found = texts.load_class_texts(path)
    assert found.synonyms == (("defect",), ("coil", "spool"), ("dust",))
    assert found.names == ("defect", "coil", "dust")
    assert [found.index_of(word) for word in ("spool", "coil", "dust", "stain")] == [1, 1, 2, None]


def test_the_order_is_the_lists(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text('[["zinc"], ["air"], ["mud"]]', encoding="utf-8")
    found = texts.load_class_texts(path)
    features = texts.load_class_features(found, use_clip=False)
    assert found.names == ("zinc", "air", "mud")
    expected = torch.stack([texts.features_from_name(name) for name in ("zinc", "air", "mud")])
    assert torch.equal(features.of(found.names)[0], expected)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", "must be a list with one list of texts per class"),
        ("[]", "must be a list with one list of texts per class"),
        ('[["a"], []]', r"class 1 is \[\]"),
        ('[["a"], [3]]', r"class 1 is \[3\]"),
        ('[["a"], 3]', "class 1 is 3"),
        ('[["a"], [" "]]', "class 1 has a blank text"),
        ('[["a", "b"], ["b"]]', "'b' more than once; a text can belong to one class only"),
        ('[["a"', "is no JSON"),
    ],
)
def test_other_lists_are_refused(tmp_path, content, text):
    path = tmp_path / "classes.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(texts.TextError, match=text):
        texts.load_class_texts(path)
    with pytest.raises(texts.TextError, match="there is no class text file"):
        texts.load_class_texts(tmp_path / "none.json")


def test_synonyms_give_the_mean_direction(tmp_path):
    table = {
        name: torch.randn(512) * factor for name, factor in (("coil", 1), ("spool", 50), ("reel", 0.1), ("dust", 3))
    }
    torch.save(table, tmp_path / "texts.pt")
    classes = texts.class_texts([["dust"], ["coil", "spool", "reel"]])
    found = texts.load_class_features(classes, tmp_path / "texts.pt")
    unit = {name: vector.double() / vector.double().norm() for name, vector in table.items()}
    mean = (unit["coil"] + unit["spool"] + unit["reel"]) / 3
    expected = torch.stack([unit["dust"], mean / mean.norm()]).float()
    assert torch.equal(found.of(classes.names)[0], expected)
    assert found.source == "read from texts.pt; mean of the synonyms' directions for coil (3)"


def test_directions_that_cancel_out_are_refused(tmp_path):
    vector = torch.randn(512)
    torch.save({"up": vector, "down": -2 * vector, "none": torch.zeros(512)}, tmp_path / "texts.pt")
    with pytest.raises(texts.TextError, match=r"class 'up' \(up, down\): .*cancel each other out"):
        texts.load_class_features(texts.class_texts([["up", "down"]]), tmp_path / "texts.pt")
    with pytest.raises(texts.TextError, match=r"class 'none'.*are zero"):
        texts.load_class_features(texts.class_texts([["none"]]), tmp_path / "texts.pt")


def test_a_class_without_synonyms_has_the_features_of_its_name_bit_for_bit():
    classes = texts.class_texts([["stain"], ["dent", "bump"]])
    found = texts.load_class_features(classes, use_clip=False, others=["scratch", "stain"])
    assert torch.equal(found.table["stain"], texts.load_texts(["stain"], use_clip=False).table["stain"])
    assert torch.equal(found.table["scratch"], texts.features_from_name("scratch"))
    assert sorted(found.table) == ["dent", "scratch", "stain"]


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer that knows the letters and ``WORDS``, in the original files' form."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges, pieces = [], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    vocabulary = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *pieces])
    vocabulary = {piece: number for number, piece in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n", encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)


def text_config(folder: Path, width: int) -> transformers.CLIPTextConfig:
    """Return the configuration of a tiny text encoder for the tokenizer of a folder."""
    ids = json.loads((folder / "source" / "vocab.json").read_text(encoding="utf-8"))
    return transformers.CLIPTextConfig(
        vocab_size=len(ids), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=width, bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip


def write_clip(folder: Path, width: int = 512, *, whole: bool = False) -> Path:
    """Write a tiny random CLIP: its text half, or with ``whole`` both halves, as openai's files have them."""
    write_tokenizer(folder)
    text = text_config(folder, width)
    torch.manual_seed(1)
    if whole:
        vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                               num_attention_heads=2, image_size=32, patch_size=16)  # fmt: skip
        config = transformers.CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=width
        )
        transformers.CLIPModel(config).save_pretrained(folder)
    else:
        transformers.CLIPTextModelWithProjection(text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_gives_the_encoders_own_vectors_normalised(clip):
    found = texts.load_texts(["missing_part", "coil", "dust"], clip=clip)
    assert found.source == f"CLIP text encoder from the folder {clip}"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    encoder = transformers.CLIPTextModelWithProjection.from_pretrained(clip).eval()
    for name, text in (("coil", "coil"), ("dust", "dust"), ("missing_part", "missing part")):
        tokens = tokenizer([text], return_tensors="pt")
        assert tokens["input_ids"].shape[1] == 2 + len(text.split())
        with torch.no_grad():
            vector = encoder(**tokens).text_embeds[0]  # alone, so without padding
        torch.testing.assert_close(found.table[name], vector / vector.norm())
        torch.testing.assert_close(found.table[name].norm(), torch.tensor(1.0))
        assert found.table[name].shape == (512,)
    assert not torch.allclose(found.table["coil"], found.table["dust"], atol=1e-3)


def test_synonyms_are_averaged_over_clips_vectors(clip):
    classes = texts.class_texts([["dust"], ["coil", "spool"]])
    found = texts.load_class_features(classes, clip=clip)
    single = texts.load_texts(["coil", "spool", "dust"], clip=clip).table
    mean = (single["coil"].double() + single["spool"].double()) / 2
    torch.testing.assert_close(found.table["coil"], (mean / mean.norm()).float())
    assert torch.equal(found.table["dust"], single["dust"])
    assert "mean of the synonyms' directions for coil (2)" in found.source


def test_a_file_of_the_whole_clip_serves_as_well(tmp_path):
    folder = write_clip(tmp_path / "whole", whole=True)
    found = texts.load_texts(["coil"], clip=folder).table["coil"]
    whole = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(folder)(["coil"], return_tensors="pt")
    with torch.no_grad():
        vector = whole.text_projection(whole.text_model(**tokens).pooler_output)[0]
    torch.testing.assert_close(found, vector / vector.norm())


def test_another_width_is_refused(tmp_path):
    folder = write_clip(tmp_path / "narrow", 256)
    with pytest.raises(texts.TextError, match="gives 256 features per text, YOLO-World takes 512"):
        texts.load_texts(["coil"], clip=folder)


def test_a_text_that_is_too_long_is_refused(clip):
    with pytest.raises(texts.TextError, match=r"has 14 tokens, .* reads 12: 'coil coil"):
        texts.load_texts(["coil " * 12, "dust"], clip=clip)


def test_folders_that_are_no_clip_are_refused(tmp_path, clip):
    with pytest.raises(texts.TextError, match="there is no folder"):
        texts.load_texts(["coil"], clip=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(texts.TextError, match="cannot be read as a CLIP text encoder with its tokenizer"):
        texts.load_texts(["coil"], clip=tmp_path / "empty")
    with pytest.raises(texts.TextError, match="two sources of text features"):
        texts.load_texts(["coil"], tmp_path / "texts.pt", clip=clip)


def test_a_clip_with_missing_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_clip(tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        texts.TextError, match=r"no whole CLIP text encoder: 1 tensors are missing, text_projection\.weight"
    ):
        texts.load_texts(["coil"], clip=folder)


def test_without_a_copy_of_clip_the_names_serve_and_it_is_said():
    found = texts.load_texts(["coil"])
    cached = texts.features_from_clip(["coil"]) is not None
    assert ("openai/clip-vit-base-patch32" if cached else "made from the class names") in found.source


def test_text_features_depend_on_the_name_alone():
    first = texts.load_texts(["stain", "dent"], use_clip=False)
    second = texts.load_texts(["scratch", "stain"], use_clip=False)
    assert torch.equal(first.table["stain"], second.table["stain"])
    assert "made from the class names" in first.source
    vectors = second.of(["scratch", "stain"])[0]
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert abs(float(vectors[0] @ vectors[1])) < 0.3
    digest = hashlib.sha256(np.round(texts.features_from_name("stain").double().numpy(), 4).tobytes()).hexdigest()
    assert digest[:12] == "68024b71ec58"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_text_features_come_from_a_file(tmp_path, suffix):
    from safetensors.torch import save_file

    path, table = tmp_path / f"texts{suffix}", {"dent": torch.randn(512), "stain": torch.randn(512)}
    torch.save(table, path) if suffix == ".pt" else save_file(table, path)
    found = texts.load_texts(["stain"], path)
    assert found.source == f"read from texts{suffix}"
    assert torch.equal(found.of(["stain", "dent"])[0], torch.stack([table["stain"], table["dent"]]))
    with pytest.raises(texts.TextError, match="no text features for scratch"):
        texts.load_texts(["scratch"], path)


def test_a_text_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "texts.pt"
    with pytest.raises(texts.TextError, match="there is no text feature file"):
        texts.load_texts(["dent"], path)
    torch.save({"dent": torch.randn(256)}, path)
    with pytest.raises(texts.TextError, match="'dent' must be a finite tensor"):
        texts.load_texts(["dent"], path)
