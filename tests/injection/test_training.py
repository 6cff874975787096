"""What trains: parameter groups, auxiliary losses, counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft import StateError
from tests.detector import LORA, detector, images, scrambled
from tests.shift import Shift

SPEC = {
    "rules": [
        {**LORA, "lr_mult": 2.0},
        {"match": "stem.conv", "kind": "rep_mona", "rank": 2, "branch_norm": True},
        {"match": "neck", "kind": "bottleneck", "norm": "group", "lr_mult": 0.5},
    ],
    "unfreeze": [{"match": "score", "lr_mult": 0.25}, "body.0"],
    "norm": "adapt",
}


def adapted() -> nn.Module:
    model = detector()
    convpeft.inject(model, SPEC, name="a")
    convpeft.inject(model, {"rules": [LORA]}, name="b")
    return model


class TestParamGroups:
    @pytest.mark.parametrize("active", ["a", "b", None], ids=str)
    def test_they_part_what_trains(self, active):
        model = adapted()
        convpeft.set_active(model, active)
        groups = convpeft.param_groups(model, lr=0.1)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(set(grouped)) == len(grouped)
        assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
        assert (active is None) == (groups == [])

    def test_the_last_weights_go_faster(self, tmp_path):
        rules = [
            {**LORA, "lr_mult": 0.5},
            {"match": "stem.conv", "kind": "rep_mona", "rank": 2, "up_mult": 16},
            {"match": "neck", "kind": "bottleneck", "up_mult": 1},
        ]
        model = detector()
        convpeft.inject(model, {"rules": rules, "unfreeze": ["score"]})
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        for round in range(2):
            keys = {id(parameter): name for name, parameter in model.named_parameters()}
            rates = {
                keys[id(parameter)]: group["lr"] / 0.1
                for group in convpeft.param_groups(model, lr=0.1, up_mult=4)
                for parameter in group["params"]
            }
            assert len(rates) == sum(p.requires_grad for p in model.parameters())
            fast = {name: rate for name, rate in rates.items() if rate > 1}
            assert fast == pytest.approx(
                {
                    "body.0.conv.convpeft.default.up": 2.0,
                    "body.1.conv.convpeft.default.up": 2.0,
                    "stem.conv.convpeft.default.up": 16.0,
                }
            )
            assert rates["body.0.conv.convpeft.default.down"] == pytest.approx(0.5)
            assert rates["neck.convpeft.default.up.weight"] == rates["score.weight"] == pytest.approx(1.0)
            if round == 0:  # a file keeps the rule's rate
                convpeft.eject(model)
                convpeft.load_adapter(model, path)

    def test_no_rate_is_refused(self):
        model = adapted()
        with pytest.raises(convpeft.OptionError, match="up_mult must be a number of at least 0"):
            convpeft.param_groups(model, lr=0.1, up_mult=-1)
        with pytest.raises(convpeft.OptionError, match="rule 1: up_mult must be a number of at least 0, not 'fast'"):
            convpeft.plan(detector(), {"rules": [{**LORA, "up_mult": "fast"}]})

    def test_rates_decay_and_names(self):
        model = adapted()
        convpeft.set_active(model, "a")
        groups = convpeft.param_groups(model, lr=0.1, weight_decay=0.05)
        keys = {id(parameter): name for name, parameter in model.named_parameters()}
        rates = {"body.0.conv.convpeft": 2, "body.1.conv.convpeft": 2, "neck": 0.5, "score": 0.25}
        bare = 0
        for group in groups:
            for parameter in group["params"]:
                name = keys[id(parameter)]
                lr_mult = next((rate for key, rate in rates.items() if name.startswith(key)), 1)
                assert group["lr_mult"] == lr_mult, name
                assert group["lr"] == 0.1 * lr_mult
                last = name.rsplit(".", 1)[-1]
                without = last in ("bias", "scale", "gate") or ".norm." in name
                assert group["weight_decay"] == (0 if without else 0.05), name
                bare += without
        assert bare == 19
        assert sorted(group["name"] for group in groups) == sorted([
            "a.rep_mona", "a.rep_mona (no decay)", "a.lora x2", "a.bottleneck x0.5", "a.bottleneck x0.5 (no decay)",
            "a.unfrozen x0.25", "a.unfrozen x0.25 (no decay)", "a.unfrozen", "a.unfrozen (no decay)",
        ])  # fmt: skip

    def test_an_optimizer_takes_them_and_moves_only_those(self):
        model = adapted()
        convpeft.set_active(model, "a")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(convpeft.param_groups(model, lr=0.1, weight_decay=0.5))
        model.train()
        model(images()).square().sum().backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved <= {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(moved) > 10
        assert "score.weight" in moved
        assert not [name for name in moved if "_stash" in name or ".b." in name]

    def test_no_groups_are_not_given_where_somebody_froze_the_adapter(self):
        model = adapted().requires_grad_(False)
        with pytest.raises(StateError, match=r"nothing of the active adapters \(b\) requires a gradient.*set_active"):
            convpeft.param_groups(model, lr=0.1)
        with convpeft.using(model, "a"):
            assert convpeft.param_groups(model, lr=0.1) == []
        convpeft.set_active(model, "b")
        assert convpeft.param_groups(model, lr=0.1)

    def test_a_rate_of_0_is_0(self):
        model = detector()
        convpeft.inject(model, {"rules": [{**LORA, "lr_mult": 0}]})
        assert [group["lr"] for group in convpeft.param_groups(model, lr=0.1)] == [0]

    def test_two_active_adapters(self):
        model = detector()
        for name in ("a", "b"):
            convpeft.inject(model, {"rules": [LORA]}, name=name)
        convpeft.set_active(model, ["b", "a"])
        assert [group["name"] for group in convpeft.param_groups(model, lr=1)] == ["b.lora", "a.lora"]


class Balanced(Shift):
    """A kind with an auxiliary loss."""

    def auxiliary_loss(self):
        return self.shift.square().sum() if self.training else None


@pytest.mark.usefixtures("clean_registry")
class TestAuxiliaryLoss:
    def test_0_without_any(self):
        model = detector()
        assert convpeft.auxiliary_loss(model).shape == ()
        assert float(convpeft.auxiliary_loss(model)) == 0
        convpeft.inject(model, {"rules": [LORA]})
        assert float(convpeft.auxiliary_loss(model.train())) == 0

    def test_the_sum_over_active_adapters(self):
        convpeft.register_adapter("balanced")(Balanced)
        model = detector()
        for name, match in {"a": ["score", "box"], "b": ["stem"]}.items():
            rule = {"match": match, "kind": "balanced", "start": 0.0}
            convpeft.inject(model, {"rules": [rule]}, name=name)
        scrambled(model)
        hosts = (("score", "a"), ("box", "a"), ("stem", "b"))
        shifts = {key: model.get_submodule(key).convpeft._modules[name].shift for key, name in hosts}
        model.train()
        for active, keys in {"a": ("box", "score"), "b": ("stem",), "ab": ("box", "score", "stem"), "": ()}.items():
            convpeft.set_active(model, list(active))
            loss = convpeft.auxiliary_loss(model)
            assert loss.item() == pytest.approx(sum(shifts[key].item() ** 2 for key in keys), rel=1e-12)
        convpeft.set_active(model, "a")
        convpeft.auxiliary_loss(model).backward()
        assert torch.equal(shifts["box"].grad, 2 * shifts["box"].detach())
        assert shifts["stem"].grad is None
        model.eval()
        assert float(convpeft.auxiliary_loss(model)) == 0


class TestSummary:
    def test_a_plain_model(self):
        model = detector()
        model.twin = model.score
        model.box.requires_grad_(False)
        found = convpeft.summary(model)
        total = sum(p.numel() for p in model.parameters())
        assert (found.base_parameters, found.trainable_parameters) == (total, total - 54)
        assert str(found).endswith("; no adapters")

    def test_counts(self):
        model = adapted()
        base = sum(p.numel() for p in detector().parameters())
        report = convpeft.plan(detector(), SPEC)
        for active in ("a", "b", None):
            convpeft.set_active(model, active)
            found = convpeft.summary(model)
            assert found.base_parameters == base
            assert found.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert found.active == (() if active is None else (active,))
            assert found.rows[0] == (
                "a",
                4,
                "rep_mona, lora, bottleneck",
                report.adapter_parameters,
                report.owned_parameters,
            )
            assert found.rows[1][:3] == ("b", 2, "lora")
            assert found.rows[1][4] == 0
        convpeft.set_active(model, "a")
        text = str(convpeft.summary(model))
        assert text.startswith(f"base {base:,} parameters; trainable now {report.trainable_parameters:,}")
        assert "a *" in text
        assert "b *" not in text
