"""The moving average follows, and is shown only inside its block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")
from examples.yolo_world.training import ema


def test_an_average_follows_and_is_shown_only_inside_the_block():
    layer = nn.Linear(2, 2).double()
    average = ema.MovingAverage({"weight": layer.weight}, 0.9)
    values, expected = [layer.weight.detach().clone()], layer.weight.detach().clone()
    for update in range(1, 4):
        with torch.no_grad():
            layer.weight.add_(1)
        average.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    values.append(layer.weight.detach().clone())
    torch.testing.assert_close(average.averages["weight"], expected, rtol=1e-12, atol=0)
    with average.shown():
        assert torch.equal(layer.weight, average.averages["weight"])
    assert torch.equal(layer.weight, values[1])
