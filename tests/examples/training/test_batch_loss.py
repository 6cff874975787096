"""The loss over processes: a gradient everywhere, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")
from examples.yolo_world.training.parallel import BatchLoss, ParallelError
from tests.training_toys import TEXTS, Toy


def part_of_a_batch(model: Toy) -> tuple[BatchLoss, dict[str, torch.Tensor]]:
    model.unused = nn.Parameter(torch.ones(3))
    loss = BatchLoss(model, processes=2)
    return loss, {"img": torch.rand(2, 3, 4, 4), "txt_feats": TEXTS}


def test_every_parameter_has_a_gradient_in_every_process(monkeypatch):
    loss, batch = part_of_a_batch(Toy().eval())
    loss.model.criterion = loss.model.init_criterion()
    monkeypatch.setattr(loss, "share", lambda: 3.0)
    value = loss(batch)
    value.backward()
    found = {name: parameter.grad.clone() for name, parameter in loss.model.named_parameters()}
    assert found.pop("unused").tolist() == [0, 0, 0]
    loss.zero_grad()
    alone = BatchLoss(loss.model)(batch)
    alone.backward()
    torch.testing.assert_close(value, 3 * alone)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 3 * loss.model.get_parameter(name).grad)
        assert gradient.any()


def test_a_loss_that_cannot_be_shared_out_is_refused_in_several_processes():
    loss, batch = part_of_a_batch(Toy())
    with pytest.raises(ParallelError, match=r"function has no 'assigner'.*train this model in one process"):
        loss(batch)
