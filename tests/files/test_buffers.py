"""Buffers in adapter files: those that training moved are there, and the digests are of the base's own, in old files too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from tests.adapter_files import assert_refused, forged, parts, put_together

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
LORA = {"rules": [{"match": "conv", "kind": "lora", "rank": 2}]}


class Net(nn.Module):
    """Scales by a table of its own, subtracts a running level, and adds a grid made at the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("table", torch.linspace(1, 2, 4)[:, None, None])
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.conv(x) * self.table * self.factor
        if self.training:
            self.steps += 1
            self.level.data.add_(y.detach().mean().double())
        if "grid" not in self._buffers:
            self.register_buffer("grid", torch.ones(y.shape[-2:]).cumsum(0))
        return y - self.level.float() + self.grid


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def ran() -> Net:
    model = base()
    model(X)
    return model


def other(name: str, value: float) -> Net:
    model = ran()
    with torch.no_grad():
        model.get_parameter(name).fill_(value) if name in dict(model.named_parameters()) else getattr(
            model, name
        ).fill_(value)
    return model


@pytest.fixture(params=["never ran", "ran"])
def trained(request):
    model = base() if request.param == "never ran" else ran()
    convpeft.inject(model, LORA, name="screw")
    nn.init.normal_(model.conv.convpeft["screw"].up, generator=torch.Generator().manual_seed(1))
    model.train()
    for _ in range(3):
        model(X)
    return model.eval()


@pytest.fixture
def saved(trained, tmp_path):
    return convpeft.save_adapter(trained, tmp_path / "screw.safetensors")


def test_the_buffers_that_moved_are_in_the_file_and_no_others(trained, saved):
    keys = {key: what for key, what in convpeft.inspect_adapter(saved).tensors.items() if key.startswith("state")}
    assert keys == {"state::level": ((), "F64"), "state::steps": ((), "I64")}


@pytest.mark.parametrize("make", [base, ran])
def test_it_loads_on_its_base_whether_or_not_that_ran(trained, saved, make):
    model, bare = make(), ran()(X)
    convpeft.load_adapter(model, saved)
    assert torch.equal(model(X), trained(X))
    assert model.steps == 3
    with convpeft.disabled(model):
        assert torch.equal(model(X), bare)
        assert model.steps == 0
    convpeft.eject(model)
    assert torch.equal(model(X), bare)
    assert model.level == 0


@pytest.mark.parametrize(("name", "value"), [("table", 1), ("level", 0.5), ("steps", 3), ("factor", 2)])
def test_a_base_with_other_values_is_refused(saved, name, value):
    error = assert_refused(
        saved, r"1 of 2 layers differ \(\(root\)\)|1 of 2 layers differ", other(name, value), convpeft.BaseMismatch
    )
    assert error.layers == ("",)


def test_a_file_without_digests_of_buffers_loads_where_it_did(trained, saved, tmp_path):
    old = forged(saved, tmp_path / "old.safetensors", lambda metadata: metadata["base"].pop("parts"))
    there = ran() if "grid" in convpeft.inspect_adapter(saved).parts[""] else base()
    convpeft.load_adapter(there, old)
    assert torch.equal(there(X), trained(X))
    injected = base()
    convpeft.inject(injected, LORA, name="first")
    if "grid" in convpeft.inspect_adapter(saved).parts[""]:
        injected(X)
    convpeft.load_adapter(injected, old)
    assert torch.equal(injected(X), trained(X))
    assert_refused(old, "layers differ", other("factor", 2), convpeft.BaseMismatch)


def test_another_adapter_s_buffers_are_not_the_base_s(trained, saved, tmp_path):
    convpeft.load_adapter(trained, saved, name="again")
    assert trained.steps == 3
    trained.train()(X)
    convpeft.set_active(trained.eval(), "screw")
    assert trained.steps == 3
    convpeft.set_active(trained, "again")
    assert trained.steps == 4
    convpeft.eject(trained, "again")
    assert trained.steps == 0
    assert convpeft.save_adapter(trained, tmp_path / "b.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("state::speed", "state::speed is not expected"),
        ("state:nowhere:level", "state:nowhere:level is not expected"),
        ("state::forward", "state::forward is not expected"),
        ("state:conv:weight", "state:conv:weight is not expected"),
    ],
)
def test_a_buffer_that_the_base_does_not_have_is_refused(saved, tmp_path, key, match):
    header, metadata, data = parts(saved)
    header[key] = header.pop("state::level")
    assert_refused(put_together(tmp_path / "x.safetensors", header, metadata, data), match, base())


def test_a_buffer_of_another_kind_is_refused(saved, tmp_path):
    header, metadata, data = parts(saved)
    header["state::level"]["dtype"] = "I64"
    path = put_together(tmp_path / "x.safetensors", header, metadata, data)
    assert_refused(path, "state::level has dtype I64 in the file, float64 here", base())


@pytest.mark.parametrize("wrong", [3, [], {"": 3}, {"": {"": 3}}])
def test_digests_of_buffers_that_are_no_texts_are_refused(saved, tmp_path, wrong):
    def change(metadata):
        metadata["base"]["parts"] = wrong

    path = forged(saved, tmp_path / "x.safetensors", change)
    assert_refused(path, "digests of the base's buffers are no texts", base())
