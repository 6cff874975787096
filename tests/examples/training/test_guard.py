"""The guard: a step that is not finite changes nothing, a streak goes back, and the run ends with a finite loss."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")

from examples.yolo_world.training.guard import GIVE_UP, Guard, GuardSettings
from tests.training_toys import same, toy_trainer, values


class Poison:
    """An extra loss that is finite but has infinite gradients, or is not finite itself, in chosen forward passes."""

    def __init__(self, passes: set[int], *, finite_loss: bool = True) -> None:
        self.passes, self.finite_loss, self.count = passes, finite_loss, -1

    def __call__(self, model: torch.nn.Module) -> torch.Tensor:
        self.count += 1
        if self.count not in self.passes:
            return torch.zeros(())
        weight = model.last.weight
        if not self.finite_loss:
            return weight.sum() * math.nan
        return ((weight - weight.detach()) * math.inf).nan_to_num(nan=0.0).sum()  # value 0, gradient not finite


@pytest.mark.parametrize("finite_loss", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_step_is_skipped_and_counted_in_any_accumulated_pass(finite_loss, which):
    poisoned = toy_trainer(extra_loss=Poison({2 * 4 + which}, finite_loss=finite_loss), ema=0.9)
    poisoned.run(until=4)
    before, average = values(poisoned), {k: v.clone() for k, v in poisoned.average.averages.items()}
    poisoned.run(until=5)
    assert same(before, values(poisoned))
    assert same(average, poisoned.average.averages)
    assert poisoned.guard.skipped == 1
    assert math.isfinite(poisoned.curves.losses[4]) == finite_loss
    assert not math.isfinite(poisoned.curves.norms[4])
    poisoned.run()
    assert not same(before, values(poisoned))
    assert poisoned.guard.skipped == 1
    assert poisoned.guard.returns == 0
    assert len(poisoned.curves.losses) == 12
    assert all(tensor.isfinite().all() for tensor in values(poisoned).values())


def parameters(trainer) -> dict[str, torch.Tensor]:
    """Return copies of the parameters; a norm's statistics have seen the batch of the step when a snapshot is taken."""
    return {
        name: value for name, value in values(trainer).items() if "norm.running" not in name and "norm.num" not in name
    }


def test_a_streak_returns_to_the_last_good_adapter_with_its_optimizer_and_a_lower_rate():
    settings = GuardSettings(streak=3, lower=0.25, every=2)
    trainer = toy_trainer(extra_loss=Poison(set(range(2 * 7, 2 * 10)), finite_loss=False), guard=settings)
    trainer.run(until=6)
    good = parameters(trainer)  # the state before step 7, at which the snapshot of step 6 was due
    state = {k: {n: t.clone() for n, t in s.items()} for k, s in trainer.optimizer.state_dict()["state"].items()}
    trainer.run(until=9)
    assert not same(good, parameters(trainer))
    trainer.run(until=10)
    assert same(good, parameters(trainer))
    assert all(tensor.isfinite().all() for tensor in values(trainer).values())
    for number, entry in trainer.optimizer.state_dict()["state"].items():
        assert same(entry, state[number])
    assert (trainer.guard.returns, trainer.guard.rate, trainer.guard.skipped) == (1, 0.25, 3)
    assert (
        "3 in a row, so back to the good adapter of step 6, with the learning rate at 0.25"
        in trainer.curves.messages[-1]
    )
    usual = toy_trainer()
    usual.run()
    trainer.run()
    assert trainer.curves.factors[:10] == usual.curves.factors[:10]
    assert trainer.curves.factors[10:] == [factor * 0.25 for factor in usual.curves.factors[10:]]
    assert math.isfinite(trainer.curves.losses[-1])


def test_a_run_that_breaks_again_at_once_goes_back_to_the_start():
    trainer = toy_trainer(
        steps=20,
        extra_loss=Poison(set(range(2 * 8, 2 * 12)), finite_loss=False),
        guard=GuardSettings(streak=2, every=3),
    )
    start = values(trainer)
    trainer.run(until=12)
    assert trainer.guard.returns == 2
    assert same(start, values(trainer))
    assert "back to the good adapter of step 0" in trainer.curves.messages[-1]


def test_a_run_that_cannot_be_held_is_given_up():
    trainer = toy_trainer(
        extra_loss=Poison(set(range(100)), finite_loss=False), guard=GuardSettings(streak=1, most_returns=2)
    )
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.*after 2 returns.*lower --lr"):
        trainer.run()


def test_a_training_that_gives_up_ends_at_its_first_bad_step():
    trainer = toy_trainer(extra_loss=Poison({2 * 4}, finite_loss=False), guard=GIVE_UP)
    with pytest.raises(FloatingPointError, match=r"^step 5: the loss is nan\. Start again with a lower --lr"):
        trainer.run()
    assert len(trainer.curves.losses) == 4
    assert a_guard(streak=GIVE_UP.streak, spike=GIVE_UP.spike)[0].fault(1e30, 1.0) is None


def test_an_explosion_by_a_huge_rate_ends_with_a_finite_loss():
    loose = GuardSettings(streak=10**9, spike=0)
    exploded = toy_trainer(lr=1e25, steps=60, guard=loose)
    exploded.run()
    assert exploded.guard.skipped > 10
    assert not math.isfinite(exploded.curves.losses[-1])
    held = toy_trainer(lr=1e25, steps=120, guard=GuardSettings(lower=0.01, most_returns=40))
    held.run()
    assert held.guard.returns >= 1
    assert math.isfinite(held.curves.losses[-1])
    assert held.curves.losses[-1] < 10
    assert all(tensor.isfinite().all() for tensor in values(held).values())


def test_a_scale_that_is_too_high_for_fp16_is_lowered_and_is_no_fault():
    trainer = toy_trainer(steps=14, extra_loss=lambda model: 50 * (model.last.weight**2).sum())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # for float32 what 2^16 is for fp16
    start = values(trainer)
    trainer.run(until=2)
    assert same(start, values(trainer))
    trainer.run()
    assert trainer.guard.skipped == 0
    assert trainer.curves.messages == []
    assert trainer.accelerator.scaler.get_scale() < 2.0**126
    assert not same(start, values(trainer))
    assert all(tensor.isfinite().all() for tensor in values(trainer).values())


def test_a_fault_of_the_loss_itself_counts_in_fp16_too():
    trainer = toy_trainer(extra_loss=Poison({8}, finite_loss=False))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.run()
    assert (trainer.guard.skipped, trainer.accelerator.scaler.get_scale()) == (1, 2.0)


def a_guard(**options) -> tuple[Guard, torch.Tensor]:
    weight = torch.nn.Parameter(torch.zeros(2))
    return Guard(GuardSettings(**options), {"weight": weight}, torch.optim.AdamW([weight])), weight


def test_a_jump_of_the_loss_is_a_fault_only_with_enough_to_compare_with():
    guard, _ = a_guard(spike=20)
    assert guard.fault(1e30, 1.0) is None
    for step in range(10):
        guard.passed(step, 2.0)
    assert guard.fault(40.0, 1.0) is None
    assert guard.fault(40.1, 1.0) == "the loss is 40.1, over 20 times the recent median 2"
    assert guard.fault(math.inf, 1.0) == "the loss is inf"
    assert guard.fault(1.0, math.nan) == "the gradients' norm is nan"
    assert a_guard(spike=0)[0].fault(1e30, 1.0) is None


def test_no_snapshot_is_taken_while_the_loss_is_high():
    guard, weight = a_guard(every=1)
    guard.passed(1, 1.0)
    weight.data += 1
    guard.passed(2, 3.0)
    assert guard.last.step == 1
    guard.passed(3, 1.5)
    assert guard.last.step == 3
    assert guard.last.tensors["weight"].tolist() == [1, 1]


def test_a_snapshot_can_be_returned_to_more_than_once():
    guard, weight = a_guard(every=1)

    def step() -> None:
        weight.grad = torch.ones(2)
        guard.optimizer.step()

    step()
    guard.passed(1, 1.0)
    found = []
    for _ in range(2):
        step()
        guard.restore(guard.last)
        state = guard.optimizer.state[weight]
        found.append({"weight": weight.detach().clone(), **{name: value.clone() for name, value in state.items()}})
    assert same(*found)
    assert float(found[0]["step"]) == 1


def test_a_good_step_ends_a_streak():
    guard, _ = a_guard(streak=2)
    for step in range(6):
        guard.failed(2 * step, "x")
        guard.passed(2 * step + 1, 1.0)
    assert (guard.skipped, guard.returns) == (6, 0)


@pytest.mark.parametrize("at", [3, 9, 11, 12, 15])
def test_a_resumed_run_is_guarded_as_the_unbroken_one(tmp_path, at):
    poison, settings = set(range(2 * 8, 2 * 11)), GuardSettings(streak=3, every=4)

    def trainer(begun: int = 0):
        extra = Poison({number - 2 * begun for number in poison}, finite_loss=False)
        return toy_trainer(steps=18, extra_loss=extra, guard=settings, ema=0.9)

    unbroken = trainer()
    unbroken.run()
    first = trainer()
    first.run(until=at)
    first.save(tmp_path / "c.safetensors")
    second = trainer(at)
    second.resume(tmp_path / "c.safetensors")
    second.run()
    assert str(second.curves.losses) == str(unbroken.curves.losses)
    assert second.curves.factors == unbroken.curves.factors
    assert second.curves.messages == unbroken.curves.messages
    assert same(values(second), values(unbroken))
    assert same(second.average.averages, unbroken.average.averages)
    assert (second.guard.skipped, second.guard.returns, second.guard.rate) == (3, 1, unbroken.guard.rate)
