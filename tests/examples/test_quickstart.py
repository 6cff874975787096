"""The quickstart runs, is short enough to be read, and what it prints is true."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ultralytics")

import convpeft
from examples.yolo_world import quickstart


def test_the_quickstart_runs_and_leaves_an_adapter_that_moves(tmp_path, capsys):
    assert quickstart.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "boxes, the trained model's bit for bit: yes" in said
    assert int(said.split("tile.safetensors: ")[1].split()[0]) > 0
    assert said.count("step ") == 8
    assert "plain tensors" in said
    file = convpeft.inspect_adapter(tmp_path / "tile.safetensors")
    assert file.name == "tile"


def test_an_adapter_that_does_not_come_back_is_said(tmp_path, capsys, monkeypatch):
    real = convpeft.load_adapter

    def forgetful(model, file):
        real(model, file)
        convpeft.set_active(model, None)

    monkeypatch.setattr(convpeft, "load_adapter", forgetful)
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "bit for bit: NO" in capsys.readouterr().out


def test_it_can_be_read_at_one_sight():
    assert len(Path(quickstart.__file__).read_text(encoding="utf-8").splitlines()) <= 60
