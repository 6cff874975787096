"""A checkpoint that lacks what adapters need is not loaded with all keys matched; a base checkpoint is, and is followed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convpeft
from convpeft import Rule, Spec

WIDTH = 4


def base():
    torch.manual_seed(0)
    head = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 2, 1))
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.ReLU()), head).eval()


def adapted(*rules, name="default", **more):
    return inject(base(), *rules, name=name, **more)


def inject(model, *rules, name="default", **more):
    spec = Spec(rules=[Rule(each, "bottleneck" if each == "1" else "lora", rank=2) for each in rules], **more)
    convpeft.inject(model, spec, name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def missing(model, state):
    """Return the keys that a strict load reports, having checked that a lenient one reports the same."""
    lenient = copy.deepcopy(model).load_state_dict(state, strict=False)
    assert lenient.unexpected_keys == []
    if not lenient.missing_keys:
        model.load_state_dict(state, strict=True)
        return set()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict") as caught:
        model.load_state_dict(state, strict=True)
    assert all(f'"{key}"' in str(caught.value) for key in lenient.missing_keys)
    return set(lenient.missing_keys)


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LACKING = {
    "the first layer": (adapted, ["2.1"], ["0", "2.1"], {}),
    "the last layer": (adapted, ["0"], ["0", "1", "2.1"], {}),
    "a container's": (adapted, ["0", "2.1"], ["0", "1", "2.1"], {}),
    "unfrozen parts": (adapted, ["0"], ["0"], {"unfreeze": ["2.1"]}),
    "unfrozen norms": (adapted, ["0"], ["0"], {"norm": "adapt"}),
    "layers and parts": (adapted, ["1"], ["0", "1"], {"unfreeze": ["2.1"]}),
}


class TestLacking:
    @pytest.mark.parametrize(("make", "saved", "wanted", "more"), LACKING.values(), ids=LACKING)
    @pytest.mark.parametrize("where", ["whole", "wrapped", "assign"])
    def test_it_is_missing(self, make, saved, wanted, more, where):
        one, two = make(*saved), make(*wanted, **more)
        if where == "wrapped":  # as DDP does
            one, two = nn.ModuleDict({"module": one}), nn.ModuleDict({"module": two})
        state = one.state_dict()
        gap = set(two.state_dict()) - set(state)
        assert gap
        assert missing(two, state) == gap

    def test_a_second_adapter_is_missing(self):
        one, two = adapted("0", name="a"), inject(adapted("0", name="a"), "0", "1", name="b")
        assert missing(two, one.state_dict()) == {key for key in two.state_dict() if ".b." in key}

    def test_part_of_an_adapter_is_missing(self):
        one = adapted("0", "2.1")
        state = one.state_dict()
        del state["2.1.convpeft.default.up"]
        assert missing(adapted("0", "2.1"), state) == {"2.1.convpeft.default.up"}

    def test_a_part_of_the_model_is_loaded(self):
        one, two = adapted("2.1"), adapted("2.1", unfreeze=["2.0"])
        assert missing(two[2], one[2].state_dict()) == {
            f"0.convpeft._stash._base.{key}" for key in base()[2][0].state_dict()
        }
        assert missing(two[0], base()[0].state_dict()) == set()

    def test_what_is_there_is_loaded_all_the_same(self, x):
        one, two = adapted("0"), adapted("0", "1")
        two.load_state_dict(one.state_dict(), strict=False)
        assert torch.equal(two[0](x), one[0](x))

    def test_loads_do_not_mix(self):
        """One load says nothing about the next, whatever the one before was."""
        model = adapted("0", "1")
        for state, gap in ((base().state_dict(), 0), (adapted("0").state_dict(), 5), (base().state_dict(), 0)) * 2:
            assert len(missing(model, state)) == gap

    def test_a_loader_that_walks_by_itself(self):
        """As mmengine's: it calls each module's part of a load and filters by prefix."""

        def load(module, state, prefix, lists):
            module._load_from_state_dict(state, prefix, {}, True, *lists)
            for name, child in module._modules.items():
                at = f"{prefix}{name}."
                load(child, {key: value for key, value in state.items() if key.startswith(at)}, at, lists)

        def outcome(model, state):
            lists: tuple = ([], [], [])
            load(model, dict(state), "", lists)
            return lists

        model, same = adapted("0", "1", unfreeze=["2.1"]), adapted("0", "1", unfreeze=["2.1"])
        assert outcome(model, same.state_dict()) == ([], [], [])
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())
        assert outcome(model, base().state_dict()) == ([], [], [])
        assert len(outcome(model, adapted("0").state_dict())[0]) == 5 + 2

    def test_foreign_tensors_are_unexpected(self):
        state = adapted("0", name="other").state_dict()
        with pytest.raises(
            RuntimeError, match=r'Missing(.|\n)*"0\.convpeft\.default\.down"(.|\n)*Unexpected(.|\n)*other'
        ):
            adapted("0").load_state_dict(state, strict=True)


class Other:
    """A base checkpoint with other values."""

    def __init__(self):
        model = base()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1) if not tensor.is_floating_point() else tensor.copy_(torch.rand_like(tensor) + 0.5)
        self.model, self.state = model, copy.deepcopy(model.state_dict())


class TestFollowing:
    """A base checkpoint that is loaded after ``inject``."""

    @pytest.mark.parametrize("active", ["a", None])
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("more", [{"unfreeze": ["2.1"]}, {"norm": "adapt"}, {"unfreeze": ["**"], "norm": "adapt"}])
    def test_untrained_copies_follow(self, active, assign, more, x):
        model, other = base(), Other()
        convpeft.inject(model, Spec(rules=[Rule("0", "lora")], **more), name="a")
        convpeft.set_active(model, active)
        model.load_state_dict(other.state, strict=True, assign=assign)
        for name in ("a", None, "a"):
            convpeft.set_active(model, name)
            assert torch.equal(model(x), other.model(x))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        assert not torch.equal(model(x), other.model(x))
        with convpeft.disabled(model):  # what follows is a copy, not the same tensor
            assert torch.equal(model(x), other.model(x))
        assert all(torch.equal(value, convpeft.eject(model).state_dict()[key]) for key, value in other.state.items())

    def test_trained_ones_stay(self, x):
        model, other = base(), Other()
        convpeft.inject(model, Spec(rules=[Rule("0", "lora")], unfreeze=["2"]))
        optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
        model[2][1](torch.randn(1, WIDTH, 2, 2)).square().sum().backward()
        optimizer.step()
        weight, scale = model[2][1].weight.detach().clone(), model[2][0].weight
        model.load_state_dict(other.state, strict=True)
        assert torch.equal(model[2][1].weight, weight)
        assert torch.equal(scale, other.state["2.0.weight"])
        assert torch.equal(model[1][0].weight, other.state["1.0.weight"])

    def test_two_owners_each_for_itself(self):
        model, other = base(), Other()
        for name in "ab":
            convpeft.inject(model, Spec(rules=[Rule("0", "lora")], unfreeze=["2.1"]), name=name)
        with torch.no_grad():
            model[2][1].weight.mul_(2)
        trained = model[2][1].weight.detach().clone()
        model.load_state_dict(other.state)
        assert torch.equal(model[2][1].weight, trained)
        assert torch.equal(model[2][1].bias, other.state["2.1.bias"])
        convpeft.set_active(model, "a")
        assert torch.equal(model[2][1].weight, other.state["2.1.weight"])

    def test_copies_follow_as_well(self, x):
        model, other = base(), Other()
        convpeft.inject(model, Spec(rules=[Rule("0", "lora")], unfreeze=["2.1"]))
        twin = copy.deepcopy(model).double().float()
        twin.load_state_dict(other.state)
        assert torch.equal(twin(x), other.model(x))

    def test_values_from_a_file_do_not(self, tmp_path):
        model, other = base(), Other()
        convpeft.inject(model, Spec(rules=[Rule("0", "lora")], unfreeze=["2.1"]))
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        model = base()
        convpeft.load_adapter(model, path)
        model.load_state_dict(other.state)
        assert torch.equal(model[2][1].weight, base()[2][1].weight)
        with convpeft.disabled(model):
            assert torch.equal(model[2][1].weight, other.state["2.1.weight"])

    def test_on_the_meta_device(self, x):
        other = Other()
        with torch.device("meta"):
            model = base()
        convpeft.inject(model, Spec(unfreeze=["2.1"]))
        model.load_state_dict(other.state, strict=True, assign=True)
        assert torch.equal(model(x), other.model(x))
        with convpeft.disabled(model):
            assert torch.equal(model(x), other.model(x))
