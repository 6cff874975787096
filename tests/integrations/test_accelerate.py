"""accelerate's and timm's own ways: a saved state has the adapter alone and is loaded in place; timm's optimizers take the groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

import convpeft
from convpeft import BaseMismatch, StateError
from convpeft.integrations.accelerate import register
from tests.detector import A, detector, images


def prepared(folder, *, steps: int, resume=None, other=None, seed: int = 0):
    """Train some steps with accelerate, save the state, and return the model."""
    from accelerate import Accelerator

    torch.manual_seed(seed)
    model = detector()
    convpeft.inject(model, A, name="screw")
    accelerator = Accelerator(cpu=True)
    register(accelerator, model)
    optimizer = torch.optim.AdamW(convpeft.param_groups(model, lr=0.01))
    parts = [each for each in (other, model, optimizer) if each is not None]
    *_, wrapped, optimizer = accelerator.prepare(*parts)
    if resume is not None:
        accelerator.load_state(resume)
    wrapped.train()
    torch.manual_seed(9)
    for _ in range(steps):
        x = images()
        accelerator.backward(wrapped(x).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder)
    return model


def test_a_saved_state_has_the_adapter_alone_and_goes_on_where_it_was(tmp_path):
    first = prepared(tmp_path / "first", steps=2)
    files = {path.name for path in (tmp_path / "first").iterdir()}
    assert "adapter.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    again = prepared(tmp_path / "again", steps=0, resume=tmp_path / "first")
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    fresh = prepared(tmp_path / "fresh", steps=0)
    assert not torch.equal(fresh.score.weight, first.score.weight)
    with pytest.raises(BaseMismatch):
        prepared(tmp_path / "else", steps=0, resume=tmp_path / "first", seed=1)


def test_other_models_are_saved_as_ever(tmp_path):
    other = nn.Linear(2, 2)
    prepared(tmp_path, steps=1, other=other)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_1.safetensors", "model.safetensors"} <= files
    wanted = other.weight.detach().clone()
    with torch.no_grad():
        other.weight.zero_()
    prepared(tmp_path / "again", steps=0, other=other, resume=tmp_path)
    assert torch.equal(other.weight, wanted)


def test_without_one_active_adapter_it_is_refused():
    from accelerate import Accelerator

    model = detector()
    with pytest.raises(StateError, match="has no adapters"):
        register(Accelerator(cpu=True), model)
    convpeft.inject(model, A)
    convpeft.set_active(model, None)
    with pytest.raises(StateError, match="active are: none"):
        register(Accelerator(cpu=True), model)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_timms_optimizers_take_the_groups(name):
    from timm.optim import create_optimizer_v2

    model = detector()
    convpeft.inject(
        model, {"rules": [{"match": "body.*.conv", "kind": "lora", "rank": 2, "lr_mult": 2.0}], "unfreeze": ["score"]}
    )
    groups = convpeft.param_groups(model, lr=0.1, weight_decay=0.05)
    optimizer = create_optimizer_v2(groups, opt=name, lr=0.1, weight_decay=0.05)
    report = convpeft.audit(model, optimizer)
    assert report.ok, report
    assert {(row.lr, row.weight_decay) for row in report.rows} == {(0.2, 0.05), (0.1, 0.05), (0.1, 0.0)}


def test_timms_reparameterize_model_refuses_adapters_and_takes_a_merged_model():
    import timm
    from timm.utils import reparameterize_model

    model = timm.create_model("repvgg_a0", num_classes=3).eval()
    convpeft.inject(model, {"rules": [{"match": "stages.0.0.conv_kxk.conv", "kind": "lora", "rank": 2}]})
    with torch.no_grad():
        model.stages[0][0].conv_kxk.conv.convpeft.default.up.normal_(0, 0.1)
    x = torch.randn(1, 3, 32, 32)
    wanted = model(x)
    with pytest.raises(convpeft.HostError, match="merge"):
        reparameterize_model(model)
    plain = reparameterize_model(convpeft.merge(model))
    torch.testing.assert_close(plain(x), wanted, rtol=1e-3, atol=1e-4)
