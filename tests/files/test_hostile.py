"""A file can ask for nothing but what its tensors are: no calls out, no long work, nothing that fails later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convpeft
from tests.adapter_files import assert_refused, base, forged, parts, picture, trained
from tests.files.hostile import written

ROOT = Path(__file__).parents[2]


def loads_of(count: int, seed: int) -> dict:
    """Return what loading so many hostile files did, in a process that is ended if it hangs."""
    command = [sys.executable, "-m", "tests.files.hostile", str(count), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120 + count, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_thousand_hostile_files_are_refused_or_work():
    found = loads_of(1000, 5)
    assert found["wrong"] == []
    assert found["refused"] > 800
    assert found["loaded"] > 10


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_twelve_thousand_hostile_files_are_refused_or_work(seed):
    assert loads_of(1000, 100 + seed)["wrong"] == []


def with_kind(original: Path, path: Path, layer: str, kind: str, **options) -> Path:
    return forged(original, path, lambda m: m["layers"][layer].update(kind=kind, options=options))


@pytest.mark.parametrize("method", ["shadow", "poly", "xlora", "adalora", "adamss", "osf", "../lora", "", "LORA"])
def test_methods_that_are_not_on_the_list_are_refused_without_peft(original, tmp_path, method):
    path = with_kind(original, tmp_path / "a", "proj", f"peft:{method}", shadow_model="/tmp/model")
    assert_refused(path, f"layer proj: a file may not name kind 'peft:{method}', only the methods boft, fourierft")
    in_spec = forged(original, tmp_path / "b", lambda m: m["spec"]["rules"][0].update(kind=f"peft:{method}"))
    assert_refused(in_spec, f"its spec: a file may not name kind 'peft:{method}'")


def test_a_refused_method_does_not_import_peft(original, tmp_path):
    path = with_kind(original, tmp_path / "a", "proj", "peft:shadow", shadow_model="org/model")
    code = (
        "import sys, convpeft; from tests.adapter_files import base\n"
        "try: convpeft.load_adapter(base(), sys.argv[1])\n"
        "except convpeft.AdapterFileError: print('peft' in sys.modules, 'transformers' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "False False\n", ended.stderr


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("lora", {"megatron_core": "os"}, "megatron_core of kind 'peft:lora' to 'os'"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights of kind 'peft:lora' to 'pissa'"),
        ("lora", {"r": 2, "lora_alpha": 2**64}, "lora_alpha of kind 'peft:lora' to 18446744073709551616"),
        ("hra", {"r": 65_536}, "r of kind 'peft:hra' to 65536"),
        ("peanut", {"depth": 65}, "depth of kind 'peft:peanut' to 65"),
        ("peanut", {"act_fn": "xielu"}, "act_fn of kind 'peft:peanut' to 'xielu'"),
        ("oft", {"num_cayley_neumann_terms": 10_000}, "num_cayley_neumann_terms of kind 'peft:oft' to 10000"),
        ("loha", {"r": [2]}, r"r of kind 'peft:loha' to \[2\]"),
        ("loha", {"target_modules": {"a": 1}}, "target_modules of kind 'peft:loha' to {'a': 1}"),
        ("ia3", {"feedforward_modules": "/etc/passwd"}, "feedforward_modules of kind 'peft:ia3' to '/etc/passwd'"),
    ],
)  # fmt: skip
def test_options_that_are_no_numbers_or_known_words_are_refused(original, tmp_path, kind, options, said):
    path = with_kind(original, tmp_path / "a", "proj", f"peft:{kind}", **options)
    assert_refused(path, f"layer proj: a file may not set {said}")


def test_a_method_is_not_tried_unless_the_file_brings_its_tensors(original, tmp_path, monkeypatch):
    from convpeft.adapters.peft_kinds import kinds

    monkeypatch.setattr(kinds, "probe", lambda *arguments: pytest.fail("tried"))
    path = with_kind(original, tmp_path / "a", "proj", "peft:hra", r=1024)
    assert_refused(path, r"adapter:proj:layer\.hra_u\.default is missing; kind 'peft:hra' .* makes \(4, 1024\)")
    tensors, metadata = load_file(path), parts(path)[1]
    tensors["adapter:proj:layer.hra_u.default"] = torch.zeros(70_000)
    written(tmp_path / "b", tensors, metadata)
    assert_refused(tmp_path / "b", r"layer\.hra_u\.default is \(70000,\) in the file; .* makes \(4, 1024\)")


@pytest.mark.parametrize("method", ["hra", "lora", "loha", "lokr", "ia3", "boft"])
def test_methods_on_the_list_load_as_they_were_saved(tmp_path, method):
    layers = ["proj"] if method == "boft" else ["stem", "proj"]
    model = trained(base(), {"rules": [{"match": layers, "kind": f"peft:{method}"}]})
    path = convpeft.save_adapter(model, tmp_path / "a")
    fresh = base()
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(picture()), model(picture()))


def test_many_branches_must_be_in_the_file(original, tmp_path):
    for count in (65, 2000, 60_000):
        path = forged(
            original, tmp_path / "a", lambda m, n=count: m["layers"]["stem"]["options"].update(kernel_sizes=[3] * n)
        )
        assert_refused(
            path, f"layer stem: option kernel_sizes of size {count:,} cannot be, the file is too small for it"
        )
    path = forged(original, tmp_path / "a", lambda m: m["layers"]["stem"]["options"].update(kernel_sizes=[3] * 64))
    assert_refused(path, "adapter:stem:branches.2.weight is missing")


@pytest.mark.parametrize("output", [10**400, -(10**30), "a" * 1001, 2.5, [0]])
def test_an_output_that_cannot_be_one_is_refused(original, tmp_path, output):
    path = forged(original, tmp_path / "a", lambda m: m["layers"]["body"].update(output=output))
    assert_refused(path, "layer body: output is|a number of 401 digits")


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("adapter:stem:down", torch.float64),
        ("adapter:stem:scale", torch.bfloat16),
        ("adapter:body.0:up", torch.float16),
        ("adapter:stem:branches.0.norm.weight", torch.float16),
        ("own:head:bias", torch.float64),
        ("own:norm:running_var", torch.float16),
    ],
)
def test_a_tensor_of_another_dtype_than_those_beside_it_is_refused(original, tmp_path, key, dtype):
    tensors = load_file(original)
    tensors[key] = tensors[key].to(dtype)
    written(tmp_path / "a", tensors, parts(original)[1])
    name = str(dtype).removeprefix("torch.")
    assert_refused(tmp_path / "a", rf"tensors do not fit; .*({key} is {name} in the file|{key} beside it is {name})")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "peft:hra"])
def test_an_adapter_in_half_precision_is_widened_for_its_float32_layer(tmp_path, kind, dtype):
    model = trained(base(), {"rules": [{"match": "proj", "kind": kind}]})
    model.proj.convpeft["screw"].to(dtype)
    path = convpeft.save_adapter(model, tmp_path / "a")
    model.proj.convpeft["screw"].float()  # every number of half precision is one of float32
    fresh = base()
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(picture()), model(picture()))


def test_a_method_of_peft_in_float64_on_a_float32_layer_is_refused(tmp_path):
    model = trained(base(), {"rules": [{"match": "proj", "kind": "peft:hra"}]})
    model.proj.convpeft["screw"].double()
    path = convpeft.save_adapter(model, tmp_path / "a")
    assert_refused(path, r"hra_u\.default is float64 in the file, and changes a weight that is not")


def test_norms_in_float32_beside_half_precision_load(tmp_path):
    """As mixed-precision tools leave them; everything comes back bit for bit."""
    model = trained(
        base(torch.bfloat16), {"rules": [{"match": "stem", "kind": "rep_mona", "rank": 2, "branch_norm": True}]}
    )
    for branch in model.stem.convpeft["screw"].branches:
        branch.norm.float()
    path = convpeft.save_adapter(model, tmp_path / "a")
    fresh = base(torch.bfloat16)
    convpeft.load_adapter(fresh, path)
    state, expected = fresh.state_dict(), model.state_dict()
    assert all(state[key].dtype == value.dtype and torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": ' + b"[[],[]," * 200_000, "holds more than that of an adapter can"),
        (b'{"a": "' + "ä".encode() * 1_200_000, "holds more than that of an adapter can"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "a number of 100,000 digits"),
        (b'{"a": {}, "a": {}}', "the key 'a' is said twice"),
        (b'{"__metadata__": {"convpeft": 3}}', "its metadata is no mapping of texts"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}}', "does not say what a is"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "a is {'dtype': 'F32'"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "a is {'dtype': 'F32'"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"a of shape \[2\] and dtype F32 has 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "overlap, or leave a gap"),
        (
            b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "b": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]}}',
            "overlap, or leave a gap",
        ),
        (b'{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}', "have 3 bytes, and 8 are there"),
    ],
)  # fmt: skip
def test_headers_that_lie_or_grow_are_refused(tmp_path, text, said):
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    assert_refused(tmp_path / "a", f"safetensors file: .*{said}")
