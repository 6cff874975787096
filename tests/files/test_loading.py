"""Adapter files: what was written comes back bit for bit, or a refusal leaves the model as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convpeft
from convpeft.injection import install
from tests.adapter_files import SPEC, assert_refused, base, condition, forged, parts, picture, trained
from tests.cases import bits, same_bits


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_process_gives_the_same_output_bit_for_bit(tmp_path, training):
    model = trained(base())
    convpeft.save_adapter(model, tmp_path / "screw.safetensors")
    code = (
        "import sys, torch, convpeft; from tests.adapter_files import base, picture\n"
        "torch.set_num_threads(1); model = base()\n"
        "convpeft.load_adapter(model, sys.argv[1] + '/screw.safetensors'); model.train(sys.argv[2] == 'True')\n"
        "torch.save(model(picture()).detach(), sys.argv[1] + '/output.pt')\n"
    )
    ended = run_python(code, tmp_path, training)
    assert ended.returncode == 0, ended.stderr
    model.train(training)
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), model(picture()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    model = trained(base(dtype))
    convpeft.save_adapter(model, tmp_path / "a.safetensors")
    fresh = base(dtype)
    convpeft.load_adapter(fresh, tmp_path / "a.safetensors")
    assert same_bits(bits(model), bits(fresh))
    assert torch.equal(fresh(picture(dtype)), model(picture(dtype)))


def test_adapters_kept_in_another_dtype_than_their_base_come_back_in_it(tmp_path):
    spec = {"rules": [{"match": "stem", "kind": "lora", "rank": 2}]}
    model = trained(base(torch.bfloat16), spec)
    model.stem.convpeft["screw"].float()
    convpeft.save_adapter(model, tmp_path / "a.safetensors")
    fresh = base(torch.bfloat16)
    convpeft.load_adapter(fresh, tmp_path / "a.safetensors")
    assert same_bits(bits(model), bits(fresh))
    assert fresh.stem.convpeft["screw"].up.dtype == torch.float32


def test_load_save_load_gives_identical_tensors_and_metadata(original, tmp_path):
    model = base()
    said = convpeft.load_adapter(model, original)
    again = convpeft.save_adapter(model, tmp_path / "again.safetensors")
    assert parts(again)[2] == parts(original)[2]
    assert parts(again)[1] == parts(original)[1]
    assert convpeft.load_adapter(base(), again) == said


def test_the_unfrozen_and_the_statistics_swap_with_a_loaded_adapter(original):
    model, x = base(), picture()
    plain, output = bits(model), model(x)
    convpeft.load_adapter(model, original)
    assert not torch.equal(model.norm.running_mean, plain["norm.running_mean"])
    assert int(model.norm.num_batches_tracked) == 7
    convpeft.set_active(model, None)
    assert torch.equal(model(x), output)
    convpeft.eject(model)
    assert same_bits(plain, bits(model))


def test_what_trains_after_a_load_is_what_trained_before(original):
    model = trained(base())
    fresh = base()
    convpeft.load_adapter(fresh, original)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == flags
    groups, expected = (convpeft.param_groups(each, lr=0.1, weight_decay=0.05) for each in (fresh, model))
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        (g["name"], g["lr"], len(g["params"])) for g in expected
    ]


def test_a_second_adapter_loads_beside_an_active_one_and_either_is_saved(original, tmp_path):
    other = {"rules": [{"match": "stem", "kind": "lora", "rank": 1}], "unfreeze": ["proj"]}
    model = trained(base(), other, "bottle", seed=9)
    own, x = model(picture()), picture()
    convpeft.load_adapter(model, original, name="second")
    assert convpeft.active_adapters(model) == ("second",)
    assert torch.equal(model(x), trained(base())(x))
    saved = convpeft.save_adapter(model, tmp_path / "bottle.safetensors", name="bottle")  # inactive while it is saved
    convpeft.set_active(model, "bottle")
    assert torch.equal(model(x), own)
    fresh = base()
    convpeft.load_adapter(fresh, saved)
    assert torch.equal(fresh(x), own)
    assert convpeft.inspect_adapter(convpeft.save_adapter(model, tmp_path / "b")).name == "bottle"  # the active one


def test_a_file_is_read_without_a_model(original):
    said = convpeft.inspect_adapter(original)
    assert (said.name, said.norm, set(said.layers)) == ("screw", "adapt", {"stem", "body.0", "body", "proj"})
    assert said.owned == {"head": 0.5, "norm": 1.0, "body.1": 1.0}
    assert set(said.base) == {"stem", "norm", "body.0", "body.1", "head", "proj"}
    assert said.layers["stem"].options["kernel_sizes"] == [3, 5]
    assert said.tensors["own:head:weight"] == ((4, 6, 1, 1), "F32")
    assert convpeft.Spec.from_dict(said.spec) == convpeft.Spec.from_dict(SPEC)


# The state of the model


def test_a_taken_or_unusable_name_is_refused(original):
    model = trained(base(), {"rules": [{"match": "stem", "kind": "lora", "rank": 1}]})
    assert_refused(original, "an adapter 'screw' is already in the model", model, convpeft.StateError)
    for name in ("a.b", "", "_a", "a b"):
        assert_refused(original, "is no adapter name", model, convpeft.StateError, name=name)


def test_a_refusal_leaves_an_active_adapter_as_it_is(original, tmp_path):
    model = trained(base(), {"rules": [{"match": "stem", "kind": "lora", "rank": 1}], "unfreeze": ["head"]}, "first")
    output = model(picture())
    path = forged(original, tmp_path / "a", lambda m: m["layers"]["proj"]["options"].update(rank=2))
    assert_refused(path, "adapter:proj:down is", model)
    assert_refused(tmp_path / "none", "cannot be read", model)
    assert torch.equal(model(picture()), output)
    assert convpeft.active_adapters(model) == ("first",)


def test_a_failure_in_the_last_step_gives_everything_back(original, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    for model in (base(), trained(base(), {"rules": [{"match": "stem", "kind": "lora", "rank": 1}]}, "first")):
        before = condition(model)
        with monkeypatch.context() as patch:
            patch.setattr(install, "train_only", fail)
            with pytest.raises(KeyboardInterrupt):
                convpeft.load_adapter(model, original)
        assert condition(model) == before
