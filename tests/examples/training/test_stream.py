"""The order of the images is a function of seed and position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")
from examples.yolo_world.training import stream


@given(count=st.integers(1, 12), seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_each_epoch_has_every_image_once(count, seed, epoch):
    places = [
        stream.Stream(range(count), seed).place(position) for position in range(epoch * count, (epoch + 1) * count)
    ]
    assert {epoch for epoch, _ in places} == {epoch}
    assert sorted(index for _, index in places) == list(range(count))


def test_epochs_and_seeds_differ_in_order():
    orders = {stream.order_of(20, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(first=st.integers(0, 9), size=st.integers(1, 4), processes=st.integers(1, 4))
def test_any_number_of_processes_sees_the_same_global_batches(first, size, processes):
    alone = list(stream.Positions(first, first + 3, size * processes))
    parts = [list(stream.Positions(first, first + 3, size, rank, processes)) for rank in range(processes)]
    joined = [[place for part in together for place in part] for together in zip(*parts, strict=True)]
    assert alone == joined


class Noise:
    """Items that are nothing but random numbers."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(3)


def test_an_item_depends_on_seed_and_position_alone():
    rows = stream.Stream(Noise(), 3)
    expected = [rows[position] for position in range(11)]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(rows[7], expected[7])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({tuple(item.tolist()) for item in expected}) == 11
    assert not torch.equal(stream.Stream(Noise(), 4)[7], expected[7])
