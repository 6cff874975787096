"""What trains goes on training, whatever the user's own ``train()`` freezes; anything else that freezes it is an error."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import convpeft
from convpeft import Rule, Spec, StateError

FROZEN = r"all its parameters here were frozen(.|\n)*set_active\(model, 'default'\)(.|\n)*using\(model, 'default'\)"


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Staged(nn.Module):
    """A backbone that freezes as mmdet's do: stages by number, and norms, in a ``train`` of its own."""

    def __init__(self, frozen_stages=1, norm_eval=True):
        super().__init__()
        self.stages = nn.Sequential(*[Block() for _ in range(3)])
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval

    def forward(self, x):
        return self.stages(x)

    def _freeze_stages(self):
        for stage in self.stages[: self.frozen_stages]:
            stage.eval()
            for parameter in stage.parameters():
                parameter.requires_grad = False

    def train(self, mode=True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


class Frozen(nn.Module):
    """A head that freezes all of itself, as mmyolo's ``freeze_all`` does."""

    def __init__(self):
        super().__init__()
        self.block, self.score = Block(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.score(self.block(x))

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            module.training = False
            for parameter in module.parameters():
                parameter.requires_grad = False
        return self


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Staged(), Frozen()

    def forward(self, x):
        return self.head(self.backbone(x))


def lora(norm="frozen", unfreeze=(), **options):
    return Spec(rules=[Rule("**.conv", "lora", rank=2, **options)], norm=norm, unfreeze=list(unfreeze))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def x():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class TestTrainOverrides:
    @pytest.mark.parametrize("norm", ["frozen", "adapt"])
    def test_all_that_trained_goes_on_training(self, norm, x):
        torch.manual_seed(0)
        model = Detector()
        convpeft.inject(
            model, lora(norm, ["head.score", "backbone.stages.0.norm"] if norm == "frozen" else ["head.score"])
        )
        wanted = trainable(model)
        assert {"head.score.weight", "backbone.stages.0.norm.weight"} <= wanted
        model.train()
        model.train()
        assert trainable(model) == wanted
        assert {name for group in convpeft.param_groups(model, lr=1) for name in [group["name"]]}
        optimizer = torch.optim.SGD(convpeft.param_groups(model, lr=0.1))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for _ in range(2):  # the first step moves what is not multiplied by an initial zero
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            model.train()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == wanted
        assert convpeft.check(model, x).ok

    def test_norms_that_adapt_train_and_others_rest(self, x):
        model = Detector()
        convpeft.inject(model, lora("adapt"))
        model.train()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [norm.running_mean.clone() for norm in norms]
        assert [norm.training for norm in norms] == [True] * 4
        model(x)
        assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
        model.eval()
        assert [norm.training for norm in norms] == [False] * 4
        convpeft.set_active(model, None)
        model.train()
        assert [norm.training for norm in norms] == [False] * 4

    def test_a_norm_inside_an_adapter_trains(self, x):
        model = Staged(frozen_stages=3)
        spec = Spec(rules=[Rule("**.conv", "rep_mona", rank=2, branch_norm=True)])
        convpeft.inject(model, spec)
        wanted = trainable(model)
        model.train()
        adapter = model.stages[0].conv.convpeft.default
        assert trainable(model) == wanted
        assert adapter.branches[0].norm.training
        model(x)
        assert adapter.branches[0].norm.num_batches_tracked == 1

    def test_what_was_frozen_on_purpose_stays_frozen(self, x):
        model = Staged()
        convpeft.inject(model, lora())
        for name, parameter in model.named_parameters():
            if name.endswith(".down"):
                parameter.requires_grad_(False)
        wanted = trainable(model)
        model.train()
        assert trainable(model) == wanted
        assert len(wanted) == 3
        model(x).sum().backward()

    def test_an_adapter_that_rests_is_not_woken(self):
        class Waking(Block):
            def train(self, mode=True):
                super().train(mode)
                for parameter in self.parameters():
                    parameter.requires_grad = True
                return self

        model = nn.Sequential(Waking())
        convpeft.inject(model, lora(), name="a")
        convpeft.inject(model, lora(unfreeze=["0.norm"]), name="b")
        model.train()
        assert {name for name in trainable(model) if ".a." in name} == set()
        assert {"0.conv.convpeft.b.down", "0.norm.weight"} <= trainable(model)

    def test_copies_hold_as_well_and_eject_lets_go(self, x):
        model = Detector()
        before = {name: type(module) for name, module in model.named_modules()}
        convpeft.inject(model, lora())
        wanted = trainable(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.train()
            assert trainable(other) == wanted
            other(x).sum().backward()
        convpeft.eject(model)
        assert {name: type(module) for name, module in model.named_modules()} == before
        model.train()
        assert not any(name.startswith("head") for name in trainable(model))

    def test_a_train_that_is_another_method(self):
        class Engine(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = Block()

            def fuse(self):
                return self

            def train(self, trainer=None, **settings):
                return ("trained", trainer, settings)

        engine = Engine()
        convpeft.inject(engine, lora())
        assert engine.train(data="x.yaml", epochs=3) == ("trained", None, {"data": "x.yaml", "epochs": 3})
        assert engine.train("mine") == ("trained", "mine", {})

    def test_a_parent_that_may_not_be_extended_is_left_alone(self, x):
        class Final(Staged):
            def __init_subclass__(cls):
                raise TypeError("Final is final")

        model = nn.Sequential(Final())
        convpeft.inject(model, lora())
        assert type(model[0]) is Final
        model.train()
        with pytest.raises(StateError, match=rf"0\.stages\.0\.conv: the adapter 'default' is to train, but {FROZEN}"):
            model(x)


def freeze_method(model):
    model.backbone._freeze_stages()


def freeze_names(model):
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.stages.1"):
            parameter.requires_grad = False


def freeze_module(model):
    model.backbone.stages[2].requires_grad_(False)


def freeze_layer(model):
    for parameter in model.backbone.stages[0].conv.parameters():
        parameter.requires_grad = False


@pytest.mark.parametrize(
    ("freeze", "where"),
    [
        (freeze_method, r"backbone\.stages\.0\.conv"),
        (freeze_names, r"backbone\.stages\.1\.conv"),
        (freeze_module, r"backbone\.stages\.2\.conv"),
        (freeze_layer, r"backbone\.stages\.0\.conv"),
        (lambda model: model.requires_grad_(False), r"backbone\.stages\.0\.conv"),
    ],
    ids=["method", "names", "module", "layer", "model"],
)
@pytest.mark.parametrize("kind", ["lora", "bottleneck", "hierarchical", "conv_lora"])
class TestFreezing:
    def spec(self, kind):
        return Spec(rules=[Rule("backbone.**.conv", kind, **({} if "lora" not in kind else {"rank": 2}))])

    def test_it_is_an_error_in_training_only(self, freeze, where, kind, x):
        model = Detector()
        convpeft.inject(model, self.spec(kind))
        model.train()
        freeze(model)
        with pytest.raises(StateError, match=f"^{where}: the adapter 'default' is to train, but {FROZEN}"):
            model(x)
        report = convpeft.check(model.eval(), x)
        assert not report.ok
        assert any(label.endswith(": default") for label in report.frozen)
        assert "should train and were frozen: backbone.stages." in str(report)
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
        with convpeft.using(model, "default"):
            model(x)
            assert convpeft.check(model, x).ok
        with convpeft.disabled(model):
            model(x)
        convpeft.set_active(model, None)
        model(x)
        convpeft.set_active(model, "default")
        model(x).sum().backward()
        assert convpeft.check(model, x).frozen == ()


class TestFreezingOfOwnValues:
    def test_an_unfrozen_layer_that_was_frozen_again(self, x):
        model = Detector()
        convpeft.inject(model, Spec(unfreeze=["head.score"], rules=[Rule("backbone.stages.0.conv", "lora")]))
        model.train()
        model.head.score.requires_grad_(False)
        with pytest.raises(StateError, match=rf"head\.score: the adapter 'default' is to train, but {FROZEN}"):
            model(x)
        assert convpeft.check(model, x).frozen == ("head.score: default",)
        model.head.score.bias.requires_grad_(True)  # a part that trains is enough
        model(x).sum().backward()

    def test_norms_that_adapt(self, x):
        model = Staged(frozen_stages=0, norm_eval=False)
        convpeft.inject(model, Spec(norm="adapt", rules=[Rule("stages.0.conv", "lora")]))
        model.train()
        model.stages[1].norm.requires_grad_(False)
        with pytest.raises(StateError, match=r"stages\.1\.norm: the adapter 'default' is to train"):
            model(x)

    def test_route_trains_what_it_routes(self, x):
        model = Staged(frozen_stages=0, norm_eval=False)
        for name in "ab":
            convpeft.inject(model, lora(), name=name)
        with convpeft.route(model.train(), ["a", "b"]):
            model(x).sum().backward()
            for parameter in model.stages[0].conv.convpeft.a.parameters():
                parameter.requires_grad_(False)
            with pytest.raises(StateError, match=r"stages\.0\.conv: the adapter 'a' is to train"):
                model(x)
        model(x).sum().backward()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_recomputation_is_no_new_pass(self, reentrant, x):
        from torch.utils.checkpoint import checkpoint

        model = Staged(frozen_stages=0, norm_eval=False)
        convpeft.inject(model, lora())
        output = checkpoint(model.train(), x.requires_grad_(), use_reentrant=reentrant)
        output.sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("up"))

    def test_functional_calls_tell_nothing(self, x):
        model = Staged(frozen_stages=0, norm_eval=False)
        convpeft.inject(model, lora())
        model.train()
        values = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        assert torch.equal(torch.func.functional_call(model, values, (x,)), model(x))

    @pytest.mark.usefixtures("clean_registry")
    def test_no_parameters_no_complaint(self, x):
        @convpeft.register_adapter("still")
        class Still(convpeft.Adapter):
            places = ("output",)

            def forward(self, z):
                return torch.zeros_like(z)

        model = Staged(frozen_stages=0, norm_eval=False)
        convpeft.inject(model, Spec(rules=[Rule("**.conv", "still")]))
        model.train()
        own = model(x)
        with convpeft.disabled(model):
            assert torch.equal(model(x), own)
