"""docs/file-format.md is true: its reader, in NumPy alone, reads what convpeft reads, and refuses what was changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import convpeft
from convpeft import Rule, Spec
from tests.adapter_files import parts, put_together
from tests.files.version1.write import SPECS, base

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
(READER,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def read(" in block]
FIXTURES = sorted((Path(__file__).parent / "version1").glob("*.safetensors"))


@pytest.fixture(scope="module")
def read():
    names: dict = {}
    exec(compile(READER, "docs/file-format.md", "exec"), names)
    return names["read"]


def test_the_reader_is_short_and_needs_numpy_alone(tmp_path):
    assert len(READER.splitlines()) <= 60
    script = f"import sys\nfor name in ('torch', 'safetensors', 'convpeft'):\n    sys.modules[name] = None\n{READER}\n"
    script += f"said, tensors = read({str(FIXTURES[0])!r})\nprint(said['name'], len(tensors))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = convpeft.inspect_adapter(FIXTURES[0])
    assert done.stdout.split() == [file.name, str(len(file.tensors))]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_it_reads_files_of_version_1_as_convpeft_does(path, read):
    said, tensors = read(path)
    ours, values = convpeft.inspect_adapter(path), load_file(path)
    assert said["version"] == 1
    assert tensors.keys() == values.keys() == ours.tensors.keys()
    for key, value in values.items():
        assert tensors[key].shape == tuple(value.shape)
        assert np.array_equal(tensors[key], value.numpy())
    assert (said["name"], said["spec"], said["owned"]) == (ours.name, ours.spec, ours.owned)
    assert (said["norm"], said["content"], said["base"]["layers"]) == (ours.norm, ours.content, ours.base)
    for layer, record in ours.layers.items():
        assert said["layers"][layer] == json.loads(json.dumps(record.to_dict()))


def test_there_is_a_file_of_each_kind():
    assert {path.stem for path in FIXTURES} == set(SPECS)


def test_it_reads_every_dtype(read, tmp_path):
    model = base()
    convpeft.inject(model, Spec(rules=[Rule("**", "lora", rank=2, only=["Conv2d"])], norm="adapt"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for _, adapter in convpeft.AdaptedModel.of(model.to(dtype)).adapters("default"):
            adapter.up.data.normal_()
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        _, tensors = read(path)
        for key, value in load_file(path).items():
            assert np.array_equal(tensors[key], value.float().numpy() if value.is_floating_point() else value.numpy())


def test_the_changed_weight_is_the_one_that_the_page_says(read, tmp_path):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(6, 8, 3, groups=2), torch.nn.ConvTranspose2d(8, 4, 3, groups=2), torch.nn.Conv2d(4, 3, 1)]
    model = torch.nn.Sequential(*layers).double()
    rules = [Rule("[01]", "lora", rank=4, alpha=3.0, rslora=True, bias=True), Rule("2", "lora", rank=2)]
    convpeft.inject(model, Spec(rules=rules))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_()
    said, tensors = read(convpeft.save_adapter(model, tmp_path / "a.safetensors"))
    merged = convpeft.merge(model)
    for number, layer in enumerate(layers):
        record = said["layers"][str(number)]
        options, geometry = record["options"], record["geometry"]
        down, up = tensors[f"adapter:{number}:down"], tensors[f"adapter:{number}:up"]
        root = np.sqrt(options["rank"]) if options["rslora"] else options["rank"]
        s = (options["rank"] if options["alpha"] is None else options["alpha"]) / root
        change = np.zeros((geometry["out_channels"], *down.shape[1:]))
        for o in range(len(change)):
            g = o // (geometry["out_channels"] // geometry["groups"])
            for j in range(up.shape[1]):
                change[o] += s * up[o, j] * down[g * up.shape[1] + j]
        got = (merged[number].weight - layer.weight).detach()
        if geometry.get("transposed"):
            got = torch.cat([part.transpose(0, 1) for part in got.chunk(geometry["groups"])])
        np.testing.assert_allclose(got.numpy(), change, rtol=0, atol=1e-12)
        if options.get("bias"):
            shift = (merged[number].bias - layer.bias).detach().numpy()
            np.testing.assert_allclose(shift, tensors[f"adapter:{number}:bias"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: data[:-8], "cannot reshape"),
        (lambda data: data + bytes(4), "do not fill"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "tensors were changed"),
        (lambda data: data.replace(b'\\"norm\\": \\"frozen\\"', b'\\"norm\\": \\"frozem\\"'), "metadata was changed"),
        (lambda data: data[:6], "truncated"),
        (lambda data: data.replace(b'\\"version\\": 1', b'\\"version\\": 2'), "version 2"),
    ],
)
def test_it_refuses_what_was_changed(damage, match, read, tmp_path):
    data = (FIXTURES[0].parent / "lora.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(damage(data))
    assert damage(data) != data
    with pytest.raises(ValueError, match=match):
        read(tmp_path / "a.safetensors")
    with pytest.raises(convpeft.AdapterFileError):
        convpeft.load_adapter(base(), tmp_path / "a.safetensors")


def test_a_gap_between_tensors_is_refused(read, tmp_path):
    header, metadata, data = parts(FIXTURES[0].parent / "lora.safetensors")
    first = min((key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"])
    header[first]["data_offsets"][0] += 4
    path = put_together(tmp_path / "a.safetensors", header, metadata, data)
    with pytest.raises(ValueError, match="does not begin where"):
        read(path)
