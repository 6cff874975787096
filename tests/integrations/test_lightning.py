"""Lightning's own Trainer: the callback injects in time, audits, and keeps the adapter alone in checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

import convpeft
from convpeft import AdapterFileError, StateError
from convpeft.integrations.lightning import adapter_of, callback
from tests.detector import detector

SPEC = {"rules": [{"match": "body.*.conv", "kind": "lora", "rank": 2, "lr_mult": 2.0}], "unfreeze": ["score"]}


def module(*, groups=True, seed=0):
    """Return a LightningModule around a detector."""
    from lightning.pytorch import LightningModule

    class Mine(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.detector = detector().float()

        def training_step(self, batch, number):
            x, y = batch
            return nn.functional.mse_loss(self.detector(x), y)

        def configure_optimizers(self):
            if groups:
                return torch.optim.Adam(convpeft.param_groups(self.detector, lr=0.01))
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Mine()


def loader():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randn(8, 4, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


def fit(folder, mine, *, epochs=2, given=None, ckpt_path=None, **options):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    ours = callback(SPEC, name="screw", module="detector") if given is None else given
    trainer = Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ours, ModelCheckpoint(folder, save_last=True)], **options,
    )  # fmt: skip
    trainer.fit(mine, loader(), ckpt_path=ckpt_path, weights_only=False)
    return trainer


def state(mine) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in mine.detector.state_dict().items()}


def test_it_trains_the_adapter_as_a_loop_by_hand_does(tmp_path):
    mine = module()
    before = state(mine)
    fit(tmp_path, mine)
    hand = module().detector
    convpeft.inject(hand, SPEC, name="screw")
    optimizer = torch.optim.Adam(convpeft.param_groups(hand, lr=0.01))
    hand.train()
    for _ in range(2):
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.mse_loss(hand(x), y).backward()
            optimizer.step()
    for key, value in hand.state_dict().items():
        torch.testing.assert_close(value, mine.detector.state_dict()[key], rtol=0, atol=1e-6)
    moved = {key for key in before if not torch.equal(before[key], state(mine)[key])}
    assert moved == {"score.weight", "score.bias"}


def test_a_checkpoint_has_the_adapter_file_alone_and_the_run_resumes(tmp_path):
    whole = module()
    fit(tmp_path / "whole", whole)
    fit(tmp_path / "part", module(), epochs=1)
    last = tmp_path / "part/last.ckpt"
    content = torch.load(last, weights_only=False)
    assert content["state_dict"] == {}
    fresh = module().detector
    convpeft.load_adapter(fresh, adapter_of(last, tmp_path / "screw.safetensors"))
    rest = module()
    fit(tmp_path / "part", rest, ckpt_path=last)
    for key, value in state(whole).items():
        torch.testing.assert_close(value, state(rest)[key], rtol=0, atol=1e-6)
    assert not torch.equal(fresh.score.weight, rest.detector.score.weight)
    with pytest.raises(convpeft.BaseMismatch):
        fit(tmp_path / "other", module(seed=1), ckpt_path=last)
    with pytest.raises(AdapterFileError, match="has no adapter file"):
        adapter_of({}, tmp_path / "none.safetensors")


def test_an_optimizer_that_ignores_the_rates_is_told_before_the_first_step(tmp_path):
    with pytest.raises(StateError, match="the rates are not in the ratio of lr_mult"):
        fit(tmp_path, module(groups=False))


def test_injecting_too_late_is_told_by_the_first_step(tmp_path):
    from lightning.pytorch import Callback

    class Late(Callback):
        def on_fit_start(self, trainer, pl_module):
            convpeft.inject(pl_module.detector, SPEC)

    with pytest.raises(StateError, match="step of Adam would train nothing"):
        fit(tmp_path, module(groups=False), given=Late())


def test_an_adapter_that_is_there_already_is_trained_on(tmp_path):
    mine = module()
    convpeft.inject(mine.detector, SPEC, name="screw")
    with torch.no_grad():
        mine.detector.body[0].conv.convpeft.screw.up.fill_(0.5)
    fit(tmp_path, mine, epochs=1)
    assert list(convpeft.AdaptedModel.of(mine.detector).state.adapters) == ["screw"]
    assert float(mine.detector.body[0].conv.convpeft.screw.up.detach().mean()) > 0.4
