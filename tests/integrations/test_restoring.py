"""An adapter gets the values of a file in place: the same parameter objects, all of the file's checks, or nothing at all."""

from __future__ import annotations

import pytest
import torch

import convpeft
from convpeft import AdapterFileError, BaseMismatch, StateError
from convpeft.integrations.restoring import restore_adapter
from tests.cases import bits, same_bits
from tests.detector import A, B, Untouched, detector, images, scrambled


@pytest.fixture
def pair(tmp_path):
    """Return two models on one base, each with an adapter of the same spec, and the file of the first's, which was trained."""
    torch.manual_seed(3)
    first = detector()
    state = {key: value.clone() for key, value in first.state_dict().items()}
    second = detector()
    second.load_state_dict(state)
    spec = {**A, "norm": "adapt"}
    for model in (first, second):
        convpeft.inject(model, spec, name="screw")
    scrambled(first)
    first.train()
    first(images())
    first.eval()
    return first, second, convpeft.save_adapter(first, tmp_path / "screw.safetensors")


def test_the_values_come_and_the_objects_stay(pair):
    first, second, path = pair
    before = {key: id(p) for key, p in second.named_parameters()}
    optimizer = torch.optim.SGD(convpeft.param_groups(second, lr=0.1))
    restore_adapter(second, path)
    assert {key: id(p) for key, p in second.named_parameters()} == before
    assert same_bits(bits(first), bits(second))
    x = images()
    assert torch.equal(first(x), second(x))
    second(x).sum().backward()
    optimizer.step()
    convpeft.set_active(second, None)
    convpeft.set_active(first, None)
    assert torch.equal(first(x), second(x))


def test_a_file_that_does_not_fit_changes_nothing(pair, tmp_path):
    _, second, path = pair
    other = detector()
    convpeft.inject(other, B, name="screw")
    wrong = convpeft.save_adapter(other, tmp_path / "other.safetensors")
    untouched = Untouched(second)
    with pytest.raises(AdapterFileError, match=r"another adapter than 'screw' here: stem\.conv, body\.0\.conv"):
        restore_adapter(second, wrong)
    stranger = detector()
    convpeft.inject(stranger, {**A, "norm": "adapt"}, name="screw")
    with pytest.raises(BaseMismatch):
        restore_adapter(stranger, path)
    untouched.check()


def test_it_has_to_be_the_active_one(pair):
    _, second, path = pair
    convpeft.inject(second, B, name="bottle")
    untouched = Untouched(second)
    with pytest.raises(StateError, match=r"are for one active adapter, and active are: bottle"):
        restore_adapter(second, path, name="screw")
    convpeft.set_active(second, None)
    with pytest.raises(StateError, match="active are: none"):
        restore_adapter(second, path)
    convpeft.set_active(second, "bottle")
    untouched.check()
    convpeft.set_active(second, "screw")
    restore_adapter(second, path, name="screw")
