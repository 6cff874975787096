"""The learning rate never leaves floor to one, whatever a run's length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ultralytics")
pytest.importorskip("accelerate")
from examples.yolo_world.training import schedule

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
