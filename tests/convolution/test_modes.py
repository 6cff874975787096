"""Torch's function modes are as before after an interrupt at any line, those of the user too."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from convpeft.convolution.modes import making_on, modes_kept
from tests.interrupts import Lines


class Users(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def make() -> torch.Tensor:
    with making_on(torch.device("meta")):
        return torch.nn.init.kaiming_uniform_(torch.empty(3, 3))


@pytest.mark.parametrize("users", [contextlib.nullcontext, Users])
def test_an_interrupt_at_any_line_is_raised_and_leaves_the_modes(users):
    with Lines() as lines:
        make()
    with users():
        before = _get_current_function_mode_stack()
        for number in range(1, lines.count + 1):
            try:
                with Lines(number):
                    make()
            except KeyboardInterrupt:
                torch.set_grad_enabled(True)  # torch's own no_grad may have been interrupted
            assert _get_current_function_mode_stack() == before, number
    assert make().is_meta


def test_torch_alone_hides_an_interrupt():
    """What this is for; if it fails, torch mends its modes itself."""
    with Lines() as lines:
        make()
    hidden = 0
    for number in range(1, lines.count + 1):
        try:
            with Lines(number), torch.device("meta"):
                torch.nn.init.kaiming_uniform_(torch.empty(3, 3))
        except KeyboardInterrupt:
            continue
        except RuntimeError:
            hidden += 1
        finally:
            while _get_current_function_mode_stack():
                torch.overrides._pop_mode()
            torch.utils._device.CURRENT_DEVICE = None
            torch.set_grad_enabled(True)
    assert hidden > 0


def test_an_error_of_the_block_goes_on_its_way_and_what_it_set_stays_when_none_is_raised():
    with pytest.raises(RuntimeError, match="mine"), modes_kept():
        raise RuntimeError("mine")
    mode = Users()
    with modes_kept():
        mode.__enter__()
    assert _get_current_function_mode_stack() == [mode]
    mode.__exit__(None, None, None)


def test_nothing_is_entered_where_tensors_are_made_there_anyway():
    with making_on(torch.device("cpu")):
        assert not _get_current_function_mode_stack()
    with torch.device("meta"), making_on(torch.device("cpu")):
        assert not torch.empty(1).is_meta
