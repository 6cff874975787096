"""The example's detector: weights files in ultralytics' form, classes, and the loss it trains with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")

from examples.yolo_world.data import texts
from examples.yolo_world.training import model


@pytest.fixture(scope="module")
def world() -> torch.nn.Module:
    return model.build_world_model("n", seed=5)


def write_checkpoint(path: Path, content: torch.nn.Module) -> Path:
    """Write a file as ultralytics' trainer does: the model in half precision inside a dictionary."""
    torch.save(
        {"model": copy.deepcopy(content).half(), "ema": None, "train_args": {"imgsz": 640}, "version": "8.3.0"}, path
    )
    return path


def batch_of(classes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "img": torch.rand(2, 3, 64, 64, generator=generator),
        "cls": torch.tensor([[0.0], [classes - 1.0], [0.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.4, 0.2, 0.2], [0.6, 0.5, 0.5, 0.5]]),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "txt_feats": torch.randn(2, classes, 512, generator=generator),
    }


def test_a_weights_file_gives_the_model_in_it_ready_to_train(world, tmp_path):
    loaded = model.load_world_model(write_checkpoint(tmp_path / "tiny-worldv2.pt", world))
    for (key, value), (other_key, other) in zip(world.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other_key
        torch.testing.assert_close(other, value.half().to(other.dtype) if value.is_floating_point() else value)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    model.use_classes(loaded, torch.randn(1, 3, 512)).train()
    losses, _ = loaded(batch_of(3))
    losses.sum().backward()
    assert torch.isfinite(losses).all()


def test_weights_that_are_none_are_refused(tmp_path):
    with pytest.raises(model.WeightsError, match="there is no weights file"):
        model.load_world_model(tmp_path / "none.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(model.WeightsError, match=r"ultralytics cannot read .*broken\.pt"):
        model.load_world_model(tmp_path / "broken.pt")
    (tmp_path / "weights.bin").write_bytes(b"no weights")
    with pytest.raises(model.WeightsError, match=r"does not end in \.pt"):
        model.load_world_model(tmp_path / "weights.bin")


def test_the_number_of_classes_may_change_between_calls(world):
    for names in (["dent", "stain"], ["a", "b", "c", "d", "e"], ["dent"]):
        features = texts.load_texts(names, use_clip=False).of(names)
        model.use_classes(world, features).eval()
        found = model.decode(world, torch.rand(2, 3, 64, 64), confidence=0.0, limit=7)
        assert [boxes.shape for boxes in found] == [(7, 6), (7, 6)]
        assert max(float(boxes[:, 5].max()) for boxes in found) <= len(names) - 1
        world.train()
        losses, _ = world(batch_of(len(names)))
        assert torch.isfinite(losses).all()


def test_a_copy_is_independent(world):
    copied = model.copy_model(world)
    with torch.no_grad():
        next(copied.parameters()).add_(1)
    assert not torch.equal(next(copied.parameters()), next(world.parameters()))
