"""Checkpoints give back what they were given, are written whole or not at all, and are refused where they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")
from examples.yolo_world.data import files
from examples.yolo_world.training import checkpoint


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    numbers = [0.1, 1e-320, float("inf"), -0.0, 1 / 3]
    content = {"optimizer": optimizer.state_dict(), "numbers": numbers, "nothing": None, "keys": {1: "a", "b": {2: 3}},
               "empty": {}, "bits": torch.tensor([True, False]), "scalar": torch.tensor(7)}  # fmt: skip
    path = tmp_path / "deep" / "c.safetensors"
    checkpoint.save_checkpoint(path, content)
    found = checkpoint.load_checkpoint(path)
    assert found["numbers"] == numbers
    assert found["keys"] == content["keys"]
    assert (found["nothing"], found["empty"]) == (None, {})
    assert torch.equal(found["bits"], content["bits"])
    assert found["scalar"].shape == ()
    other = torch.optim.AdamW(layer.parameters(), lr=5.0)
    other.load_state_dict(found["optimizer"])
    assert other.param_groups[0]["lr"] == 1e-3
    for parameter in layer.parameters():
        for name, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][name], value)
    assert [entry.name for entry in path.parent.iterdir()] == ["c.safetensors"]


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, {"step": 1})

    def fail(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(path, {"step": 2})
    assert checkpoint.load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.safetensors"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    with pytest.raises(checkpoint.CheckpointError, match="there is no checkpoint"):
        checkpoint.load_checkpoint(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="no training checkpoint"):
        checkpoint.load_checkpoint(path)
    checkpoint.save_checkpoint(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.load_checkpoint(path)


def test_tensors_of_another_adapter_change_nothing():
    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    put = torch.Tensor.copy_
    with pytest.raises(checkpoint.CheckpointError, match=r"run is of another adapter.*b is \(4,\), here \(3,\)"):
        checkpoint.copy_into(live, {"a": torch.ones(2), "b": torch.ones(4)}, put, "run")
    with pytest.raises(checkpoint.CheckpointError, match="b is missing; c is not in this model"):
        checkpoint.copy_into(live, {"a": torch.ones(2), "c": torch.ones(3)}, put, "run")
    assert not any(tensor.any() for tensor in live.values())
