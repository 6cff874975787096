"""mmengine's own Runner with a model from a config: groups, auxiliary losses, EMA, checkpoints, resume and load_from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

import convpeft
import convpeft.integrations.mmengine
from convpeft import BaseMismatch, OptionError, StateError
from convpeft.integrations.restoring import adapter_of
from tests.detector import detector

LORA = {"match": "inner.body.*.conv", "kind": "lora", "rank": 2, "lr_mult": 2.0}
SPEC = {"rules": [LORA], "unfreeze": ["inner.score"]}
MOE = {"match": "inner.neck", "kind": "moe_rep_mona", "rank": 2, "load_balancing": 0.5, "place": "output"}


@MODELS.register_module(force=True)
class TinyDetector(BaseModel):
    """A detector in mmengine's manner."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = detector().float()

    def forward(self, inputs, labels, mode="tensor"):
        found = self.inner(inputs)
        return {"loss_box": nn.functional.mse_loss(found, labels)} if mode == "loss" else found


@pytest.fixture(autouse=True)
def _reads_its_own_checkpoints(monkeypatch):
    """mmengine 0.10 pickles its log into checkpoints, which torch since 2.6 opens only if it is told to."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"inputs": torch.randn(3, 8, 8, generator=generator), "labels": torch.randn(4, generator=generator)}


def runner(folder, *, epochs=2, spec=SPEC, seed=0, model=None, wrapper=None, hooks=(), **options) -> Runner:
    """Train a config and return its runner."""
    made = {"type": "ConvPeft", "detector": {"type": "TinyDetector", "seed": seed}, "spec": spec, "name": "screw"}
    found = Runner(
        model=made if model is None else model, work_dir=str(folder), experiment_name=f"run{id(folder)}-{torch.rand(1).item()}",
        train_dataloader={
            "dataset": Images(), "batch_size": 4, "num_workers": 0, "collate_fn": {"type": "default_collate"}, "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={
            "constructor": "ConvPeftOptimWrapperConstructor", "optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.05},
            **(wrapper or {}),
        },
        custom_hooks=[{"type": "ConvPeftHook"}, *hooks], log_level="WARNING", randomness={"seed": 1}, **options,
    )  # fmt: skip
    found.train()
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one: dict, other: dict, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=tolerance)


class Look(Hook):
    """Keeps the weights that a run begins with."""

    def before_train(self, runner) -> None:
        self.first = state(runner.model)


def test_it_trains_the_adapter_as_a_loop_by_hand_does(tmp_path):
    look = Look()
    found = runner(tmp_path, hooks=[look])
    groups = {
        group["name"]: (group["lr"], group["weight_decay"]) for group in found.optim_wrapper.optimizer.param_groups
    }
    assert groups["screw.lora x2"] == (0.02, 0.05)
    assert groups["screw.unfrozen (no decay)"] == (0.01, 0.0)
    hand = TinyDetector()
    convpeft.inject(hand, SPEC, name="screw")
    assert_same(
        {k: v for k, v in state(hand).items() if "convpeft" not in k},
        {k: v for k, v in look.first.items() if "convpeft" not in k},
    )
    hand.load_state_dict(look.first)
    optimizer = torch.optim.AdamW(convpeft.param_groups(hand, lr=0.01, weight_decay=0.05))
    hand.train()
    for _ in range(2):
        for batch in torch.utils.data.DataLoader(Images(), batch_size=4):
            optimizer.zero_grad()
            hand(**batch, mode="loss")["loss_box"].backward()
            optimizer.step()
    assert_same(state(hand), state(found.model), 1e-6)
    assert not torch.equal(hand.inner.score.weight, look.first["inner.score.weight"])


def test_a_checkpoint_has_the_adapter_alone_and_the_run_resumes_to_the_same_weights(tmp_path):
    whole = runner(tmp_path / "whole")
    runner(tmp_path / "part", epochs=1)
    last = tmp_path / "part/epoch_1.pth"
    content = torch.load(last, weights_only=False)
    assert content["state_dict"] == {}
    fresh = TinyDetector()
    convpeft.load_adapter(fresh, adapter_of(content, tmp_path / "screw.safetensors"))
    rest = runner(tmp_path / "part", resume=True, load_from=str(last))
    assert rest.epoch == 2
    assert_same(state(whole.model), state(rest.model), 1e-6)
    with pytest.raises(BaseMismatch):
        runner(tmp_path / "other", load_from=str(last), seed=1)
    again = runner(tmp_path / "again", load_from=str(last), epochs=1, wrapper={"optimizer": {"type": "SGD", "lr": 0.0}})
    assert_same(state(fresh), state(again.model))


def test_the_average_is_what_the_adapter_file_has(tmp_path):
    found = runner(tmp_path, hooks=[{"type": "EMAHook", "momentum": 0.3}])
    content = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    fresh = TinyDetector()
    convpeft.load_adapter(fresh, adapter_of(content, tmp_path / "screw.safetensors"))
    assert_same({key: fresh.state_dict()[key] for key in content["state_dict"]}, content["state_dict"])
    assert not torch.equal(fresh.inner.score.weight, found.model.inner.score.weight)


def test_auxiliary_losses_are_in_the_log_and_in_the_loss(tmp_path):
    made = convpeft.integrations.mmengine.adapted_model({"type": "TinyDetector"}, {"rules": [MOE]})
    batch = {"inputs": torch.randn(2, 3, 8, 8), "labels": torch.randn(2, 4)}
    losses = made.train()(**batch, mode="loss")
    assert float(losses["loss_convpeft"]) == float(convpeft.auxiliary_loss(made)) > 0
    total, log = made.parse_losses(losses)
    torch.testing.assert_close(total, losses["loss_box"] + losses["loss_convpeft"])
    assert "loss_convpeft" in log
    assert isinstance(made.eval()(**batch), torch.Tensor)


def test_wrong_configs_are_told(tmp_path):
    with pytest.raises(OptionError, match=r"paramwise_cfg=.* would match parts of the names of adapters"):
        runner(tmp_path, wrapper={"paramwise_cfg": {"custom_keys": {"score": {"lr_mult": 0.1}}}})
    with pytest.raises(StateError, match="this TinyDetector has no adapters"):
        runner(tmp_path, model={"type": "TinyDetector"})


def test_injecting_in_a_hook_is_told_by_the_first_step(tmp_path):
    class Late(Hook):
        def before_train(self, runner) -> None:
            convpeft.inject(runner.model, SPEC)

    late = Late()
    with pytest.raises(StateError, match="step of AdamW would train nothing"):
        runner(
            tmp_path,
            model={"type": "TinyDetector"},
            wrapper={"constructor": "DefaultOptimWrapperConstructor"},
            hooks=[late],
        )
