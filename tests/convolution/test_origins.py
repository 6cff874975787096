"""Where a map came from: the activation that made it can make it again, bit for bit, and no other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convpeft
from convpeft.convolution.origins import origin_of
from tests.lean import SEES_HOOKS, images
from tests.saved import kept


@SEES_HOOKS
def test_an_input_that_its_activation_can_make_again_is_not_kept():
    """Three blocks keep the map before each activation, and no map after one."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(3)]
    model = nn.Sequential(*blocks).double()
    convpeft.inject(model, {"rules": [{"match": "**.0", "kind": "lora", "rank": 1}]})
    x = images().repeat(1, 2, 1, 1)[:, :4]
    maps = [tensor for tensor in kept(model.train(), x) if tensor.shape[1:] == (4, 12, 12)]
    assert len(maps) == 4  # the input, and three


class TestOrigin:
    @SEES_HOOKS
    @pytest.mark.parametrize(
        "function",
        [F.silu, F.hardswish, F.mish, F.gelu, F.relu6, F.leaky_relu, lambda x: F.silu(x, inplace=True)],
        ids=["silu", "hardswish", "mish", "gelu", "relu6", "leaky-relu", "silu-in-place"],
    )
    def test_it_makes_the_very_bits(self, function):
        source = torch.randn(2, 3, 5, 5, requires_grad=True) * 3
        x = function(source)
        origin = origin_of(x)
        assert torch.equal(origin.remake(origin.source), x)

    @pytest.mark.parametrize("change", [lambda x: x.relu(), lambda x: x[:, :1], lambda x: x.detach(), lambda x: x + 1])
    def test_there_is_none_for_what_no_such_activation_made(self, change):
        assert origin_of(change(F.silu(torch.randn(2, 3, 5, 5, requires_grad=True)))) is None

    def test_there_is_none_for_a_map_that_was_written_to(self):
        x = F.silu(torch.randn(2, 3, 5, 5, requires_grad=True) * 1)
        with torch.no_grad():
            x.clamp_(max=0.5)
        assert origin_of(x) is None

    def test_there_is_none_while_a_checkpoint_records(self):
        asked = []

        def run(x: Tensor) -> Tensor:
            y = F.silu(x * 2)
            asked.append(origin_of(y))
            return y.sum()

        checkpoint(run, torch.ones(3, requires_grad=True), use_reentrant=False).backward()
        assert set(asked) == {None}
