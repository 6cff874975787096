"""The parts of the training loop by themselves: schedule, order, averages, checkpoints, the loss over processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")

from examples.yolo_world.data import files
from examples.yolo_world.training import checkpoint, ema, schedule, stream
from examples.yolo_world.training.parallel import BatchLoss, ParallelError
from tests.training_toys import TEXTS, Toy

shares = st.floats(0, 1)


@given(step=st.integers(-5, 5000), steps=st.integers(1, 2000), warm_up=shares, floor=shares)
def test_the_rate_never_leaves_floor_to_one(step, steps, warm_up, floor):
    assert 0 <= floor <= schedule.rate_factor(step, steps, warm_up=warm_up, floor=floor) <= 1


@given(steps=st.integers(1, 2000), beyond=st.integers(0, 10**6), warm_up=shares, floor=shares)
def test_the_rate_stays_at_the_floor_past_the_end(steps, beyond, warm_up, floor):
    assert schedule.rate_factor(steps + beyond, steps, warm_up=warm_up, floor=floor) == floor


@given(steps=st.integers(2, 2000), longer=st.integers(0, 2000), at=st.integers(0, 2000))
def test_a_run_resumed_with_another_length_stays_between_floor_and_one(steps, longer, at):
    assert schedule.FLOOR <= schedule.rate_factor(at, max(steps - longer, 1)) <= 1
    assert schedule.FLOOR <= schedule.rate_factor(at, steps + longer) <= 1


def test_the_rate_rises_then_falls():
    rates = [schedule.rate_factor(step, 100) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[0], max(rates), rates[100]) == (0.05, 1, 0.05)


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
