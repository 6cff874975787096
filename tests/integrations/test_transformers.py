"""transformers' own Trainer on a small real model: groups and rates, adapters in checkpoints, resume, the best, whole folders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import convpeft
from convpeft import AdapterFileError, HostError, StateError
from convpeft.integrations.transformers import from_pretrained, save_pretrained, trainer

SPEC = {
    "rules": [
        {"match": "resnet.encoder.stages.*.layers.*.layer.*.convolution", "kind": "lora", "rank": 2, "lr_mult": 2.0}
    ],
    "unfreeze": ["classifier.1"],
}


def model(seed: int = 0) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}


def adapted(spec=SPEC, seed: int = 0) -> nn.Module:
    made = model(seed)
    convpeft.inject(made, spec, name="screw")
    return made


def run(folder, made, *, steps=4, batch=4, resume=None, optim="adamw_torch", **options):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=0.05, optim=optim, weight_decay=0.1,
        save_strategy="steps", save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant", seed=1, **options,
    )  # fmt: skip
    torch.manual_seed(5)
    ours = trainer()(model=made, args=arguments, train_dataset=Images(), eval_dataset=Images())
    ours.train(resume_from_checkpoint=resume)
    return ours


def state(made: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in made.state_dict().items()}


def assert_same(one: dict, other: dict, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=tolerance)


def test_it_trains_the_adapter_with_its_rates_and_saves_nothing_else(tmp_path):
    made = adapted()
    before = state(made)
    ours = run(tmp_path, made)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in ours.optimizer.param_groups}
    assert groups["screw.lora x2"] == (0.1, 0.1)
    assert groups["screw.unfrozen (no decay)"] == (0.05, 0.0)
    moved = {key for key, value in state(made).items() if not torch.equal(value, before[key])}
    own = {key for key in before if ".convpeft.screw." in key}
    assert moved == own | {"classifier.1.weight", "classifier.1.bias"}
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_screw.safetensors" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    ours.save_model(tmp_path / "final")
    fresh = model()
    convpeft.load_adapter(fresh, tmp_path / "final/adapter_screw.safetensors")
    assert_same(state(fresh), state(made))


def test_it_trains_as_a_loop_by_hand_does(tmp_path):
    ours = run(
        tmp_path, adapted(), steps=3, batch=8, optim="sgd", max_grad_norm=0.0
    )  # all images in each step: their order is no matter
    hand = adapted()
    batch = torch.utils.data.default_collate([Images()[number] for number in range(8)])
    optimizer = torch.optim.SGD(convpeft.param_groups(hand, lr=0.05, weight_decay=0.1))
    hand.train()
    for _ in range(3):
        optimizer.zero_grad()
        hand(**batch).loss.backward()
        optimizer.step()
    assert_same(state(ours.model), state(hand), 1e-6)


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    whole = run(tmp_path / "whole", adapted())
    run(tmp_path / "part", adapted(), steps=2)
    rest = adapted()
    run(tmp_path / "part", rest, resume=str(tmp_path / "part/checkpoint-2"))
    assert_same(state(whole.model), state(rest), 1e-6)


def test_the_best_checkpoint_is_loaded_at_the_end_bit_for_bit(tmp_path):
    made = adapted()
    ours = run(
        tmp_path, made, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    assert ours.state.best_model_checkpoint
    best = model()
    convpeft.load_adapter(best, f"{ours.state.best_model_checkpoint}/adapter_screw.safetensors")
    assert_same(state(made), state(best))
    logged = [entry["eval_loss"] for entry in ours.state.log_history if "eval_loss" in entry]
    assert ours.evaluate()["eval_loss"] == pytest.approx(max(logged), rel=1e-6)


def test_auxiliary_losses_are_part_of_the_loss(tmp_path):
    spec = {
        "rules": [
            {"match": "resnet.encoder.stages.1.layers.0", "kind": "moe_rep_mona", "rank": 2, "load_balancing": 0.5}
        ]
    }
    made = adapted(spec)
    ours = run(tmp_path, made, steps=1)
    batch = dict(next(iter(ours.get_train_dataloader())))
    made.train()
    loss, outputs = ours.compute_loss(made, batch, return_outputs=True)
    extra = convpeft.auxiliary_loss(made)
    assert float(extra) > 0
    torch.testing.assert_close(loss, outputs["loss"] + extra)


def test_wrong_uses_are_told(tmp_path):
    with pytest.raises(StateError, match="this ResNetForImageClassification has no adapters"):
        run(tmp_path, model())
    run(tmp_path, adapted(), steps=2)
    other = model()
    convpeft.inject(other, SPEC, name="bottle")
    with pytest.raises(AdapterFileError, match=r"has no adapter 'bottle' \(it has: adapter_screw\.safetensors\)"):
        run(tmp_path, other, resume=str(tmp_path / "checkpoint-2"))
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    made = adapted()
    flat = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    ours = trainer()(model=made, args=arguments, train_dataset=Images(), optimizers=(flat, None))
    with pytest.raises(StateError, match="the rates are not in the ratio of lr_mult"):
        ours.train()
    ours = trainer()(model=made, args=arguments)
    greedy = (torch.optim.SGD, {"optimizer_dict": {}})
    type(ours).get_optimizer_cls_and_kwargs = staticmethod(lambda args, model: greedy)
    with pytest.raises(HostError, match="makes its own groups of parameters"):
        ours.create_optimizer()


def test_a_folder_has_the_base_untouched_and_its_adapters_beside(tmp_path):
    made = adapted()
    run(tmp_path / "run", made)
    convpeft.inject(made, {"rules": SPEC["rules"]}, name="bottle")
    convpeft.set_active(made, "screw")
    x = torch.randn(1, 3, 32, 32)
    made.eval()
    wanted = made(x).logits
    save_pretrained(made, tmp_path / "whole")
    assert convpeft.active_adapters(made) == ("screw",)
    bare = type(model()).from_pretrained(tmp_path / "whole")
    assert_same(state(bare), state(model()))
    again = from_pretrained(type(model()), tmp_path / "whole").eval()
    assert_same({"": again(x).logits}, {"": bare.eval()(x).logits})
    convpeft.set_active(again, "screw")
    assert_same({"": again(x).logits}, {"": wanted})
    assert again.config.architectures == ["ResNetForImageClassification"]
    model().save_pretrained(tmp_path / "bare")
    with pytest.raises(AdapterFileError, match="has no adapters"):
        from_pretrained(type(model()), tmp_path / "bare")
