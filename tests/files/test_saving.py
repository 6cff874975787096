"""Adapter files: what is written comes back bit for bit, and whatever is off is refused with nothing changed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convpeft
from tests.adapter_files import SPEC, assert_refused, base, condition, forged, parts, picture, trained
from tests.cases import bits, same_bits


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """An adapter file of all three kinds, an unfrozen layer and adapted norms."""
    path = tmp_path_factory.mktemp("files") / "screw.safetensors"
    return convpeft.save_adapter(trained(base()), path)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


# What comes back


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


def test_the_file_holds_the_adapter_and_nothing_else(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(256, 256, 3), torch.nn.Conv2d(256, 256, 3))
    convpeft.inject(model, {"rules": [{"match": "1", "kind": "lora", "rank": 16}]})
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    expected = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert expected == (256 * 9 + 256) * 16 * 4
    assert expected < path.stat().st_size < expected + 4096


def test_saving_changes_nothing_and_makes_its_folder(tmp_path):
    model = trained(base())
    before = condition(model)
    path = convpeft.save_adapter(model, tmp_path / "new" / "folder" / "a.safetensors")
    assert condition(model) == before
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [each.name for each in path.parent.iterdir()] == ["a.safetensors"]


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
    from convpeft.injection import install

    def fail(*arguments):
        raise KeyboardInterrupt

    for model in (base(), trained(base(), {"rules": [{"match": "stem", "kind": "lora", "rank": 1}]}, "first")):
        before = condition(model)
        with monkeypatch.context() as patch:
            patch.setattr(install, "train_only", fail)
            with pytest.raises(KeyboardInterrupt):
                convpeft.load_adapter(model, original)
        assert condition(model) == before


def test_save_says_which_adapter_it_needs(tmp_path):
    with pytest.raises(convpeft.StateError, match="has no adapters"):
        convpeft.save_adapter(base(), tmp_path / "a")
    model = trained(base())
    convpeft.inject(model, {"rules": [{"match": "stem", "kind": "lora", "rank": 1}]}, name="second")
    with pytest.raises(convpeft.UnknownAdapter, match=r"no adapter is named 'scew'; .*Did you mean 'screw'"):
        convpeft.save_adapter(model, tmp_path / "a", name="scew")
    convpeft.set_active(model, None)
    with pytest.raises(convpeft.StateError, match=r"which adapter.*screw, second"):
        convpeft.save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# Writing


KILLED = """
import os, sys, time, convpeft
from tests.adapter_files import base, trained
model = trained(base(), seed=11)
def slow(function):
    def wait(*arguments):
        print("now", flush=True)
        time.sleep(60)
        return function(*arguments)
    return wait
setattr(os, sys.argv[2], slow(getattr(os, sys.argv[2])))
convpeft.save_adapter(model, sys.argv[1])
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_killed_while_it_saves_leaves_the_old_file(original, tmp_path, step):
    path = tmp_path / "screw.safetensors"
    path.write_bytes(original.read_bytes())
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), step],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "now\n"
        assert len(list(tmp_path.glob(".screw*.part"))) == 1  # it really was in the middle
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == original.read_bytes()
    model = base()
    convpeft.load_adapter(model, path)
    assert torch.equal(model(picture()), trained(base())(picture()))


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_and_no_litter(original, tmp_path, monkeypatch, step, error):
    path = tmp_path / "screw.safetensors"
    path.write_bytes(original.read_bytes())
    model = trained(base(), seed=11)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, step, fail)
    expected = convpeft.AdapterFileError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be written: .*No space left" if isinstance(error, OSError) else None):
        convpeft.save_adapter(model, path)
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == ["screw.safetensors"]
    assert path.read_bytes() == original.read_bytes()


def test_a_place_that_cannot_be_written_is_a_named_error(tmp_path):
    model = trained(base())
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / "folder", Path("/proc/none/a.safetensors")):
        with pytest.raises(convpeft.AdapterFileError, match="cannot be written"):
            convpeft.save_adapter(model, path)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder", "inside"]


def test_a_save_replaces_the_old_file_whole(original, tmp_path):
    path = tmp_path / "screw.safetensors"
    path.write_bytes(original.read_bytes() * 3)
    model = trained(base(), seed=11)
    convpeft.save_adapter(model, path)
    fresh = base()
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(picture()), model(picture()))
