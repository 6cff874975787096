"""Adapter files written before the package was divided into rooms, one of each kind: they load bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import convpeft
from tests.files.version1.write import SPECS, base, image

FOLDER = Path(__file__).parent / "version1"
OUTPUTS = json.loads((FOLDER / "outputs.json").read_text(encoding="utf-8"))


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Return a file's tensors, and what its metadata says but for the version of torch, notes that are newer, and the seal."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["convpeft"])
    return load_file(path), {key: value for key, value in metadata.items() if key not in ("torch", "seal", "hosts")}


def test_every_kind_of_this_code_has_a_file():
    kinds = {
        layer.kind for path in FOLDER.glob("*.safetensors") for layer in convpeft.inspect_adapter(path).layers.values()
    }
    assert kinds >= set(convpeft.adapter_kinds()) - {"channel_bias"}
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(SPECS)


@pytest.mark.parametrize("kind", SPECS)
def test_it_loads_and_is_saved_again_bit_for_bit(kind, tmp_path):
    model = base()
    bare = model(image())
    convpeft.load_adapter(model, FOLDER / f"{kind}.safetensors")
    torch.testing.assert_close(model(image()), torch.tensor(OUTPUTS[kind], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    again = convpeft.save_adapter(model, tmp_path / "again.safetensors")
    (old, said), (new, says) = contents(FOLDER / f"{kind}.safetensors"), contents(again)
    assert says == said
    assert old.keys() == new.keys()
    assert all(old[key].dtype == new[key].dtype and torch.equal(old[key], new[key]) for key in old)
    convpeft.eject(model)
    assert torch.equal(model(image()), bare)
    assert not torch.allclose(bare, torch.tensor(OUTPUTS[kind], dtype=torch.float64))  # the file does something
