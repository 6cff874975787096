"""Writing an adapter file: it holds the adapter alone, and whatever fails leaves the old one."""

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
from tests.adapter_files import base, condition, picture, trained


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
