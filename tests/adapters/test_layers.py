"""The layers of adapters compute and begin as torch's do, and nobody who initialises by class or name meets them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import convpeft
from convpeft import Rule, Spec
from convpeft.adapters.layers import Affine, Filter, Standardize, StandardizeMap

PAIRS = {
    "affine": (lambda: Affine(5, 3), lambda: nn.Linear(5, 3), (2, 4, 5)),
    "affine without a bias": (lambda: Affine(5, 3, bias=False), lambda: nn.Linear(5, 3, bias=False), (2, 5)),
    "1x1": (lambda: Filter(4, 6, 1), lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "grouped 3x3": (
        lambda: Filter(4, 6, 3, padding=1, groups=2),
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        (4, 5, 5),
    ),
    "pixels": (lambda: Standardize(4), lambda: nn.LayerNorm(4), (2, 3, 4)),
    "map": (lambda: StandardizeMap(4), lambda: nn.GroupNorm(1, 4), (2, 4, 3, 3)),
}


@pytest.mark.parametrize(("own", "torchs", "shape"), PAIRS.values(), ids=PAIRS)
def test_they_begin_and_compute_as_torchs(own, torchs, shape):
    torch.manual_seed(0)
    ours = own()
    torch.manual_seed(0)
    theirs = torchs()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    for layer in (ours, theirs):
        with torch.no_grad():
            layer.weight.add_(0.3)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    assert not isinstance(ours, type(theirs))


def by_class(model):
    """As torchvision's and mmengine's: each class its own initialisation."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Conv1d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.1)
        elif isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0.1)


def by_name(model):
    for module in model.modules():
        name = type(module).__name__
        if any(part in name for part in ("Conv2d", "Linear", "Norm")) and hasattr(module, "weight"):
            nn.init.normal_(module.weight, 0.5, 0.1)


def by_apply(model):
    model.apply(lambda module: [nn.init.normal_(parameter, std=0.5) for parameter in module.parameters(recurse=False)])


def by_named_apply(model):
    from timm.models import named_apply

    named_apply(lambda module, name: [nn.init.normal_(p) for p in module.parameters(recurse=False)], model)


def by_children(model):
    """As mmengine's ``BaseModule.init_weights``: from children to children."""
    for child in model.children():
        by_children(child)
    for parameter in model.parameters(recurse=False):
        nn.init.normal_(parameter)


def by_reset(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return self.block(self.norm(self.stem(x)))


KINDS = {
    "lora": {"rank": 2},
    "bottleneck": {"norm": "group"},
    "hierarchical": {},
    "rep_mona": {"rank": 2, "branch_norm": True},
    "mona": {"rank": 4},
    "moe_rep_mona": {"rank": 4, "spatial_attention": True},
    "conv_lora": {"rank": 2},
    "peft:lora": {"r": 2},
    "peft:loha": {"r": 2},
}


@pytest.mark.parametrize("initialise", [by_class, by_name, by_apply, by_named_apply, by_children, by_reset])
@pytest.mark.parametrize("kind", KINDS)
def test_an_initialisation_of_the_model_passes_adapters_by(kind, initialise):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 4, 8, 8)
    convpeft.inject(model, Spec(rules=[Rule("block.0", kind, **KINDS[kind])]))
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".convpeft." in name}
    own = {name: value for name, value in own.items() if ".norm." not in name or kind != "rep_mona"}  # see Branch
    base = model.stem.weight.detach().clone()
    initialise(model)
    assert not torch.equal(model.stem.weight, base)
    assert [
        name for name, parameter in model.named_parameters() if name in own and not torch.equal(parameter, own[name])
    ] == []
    output = model(x)
    with convpeft.disabled(model):
        assert torch.equal(model(x), output)


def test_transformers_own_initialisation_passes_adapters_by():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2, num_channels=4
    )
    model = transformers.ResNetForImageClassification(config).eval()
    convpeft.inject(model, Spec(rules=[Rule("resnet.encoder.stages.*.layers.0", "bottleneck", channels=8)]))
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".convpeft." in name}
    for module in model.modules():
        model._init_weights(module)
    model.apply(model._init_weights)
    assert own
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in own.items())


def test_fresh_layers_spread_as_torchs_do():
    torch.manual_seed(0)
    weight = Filter(64, 64, 3, padding=1).weight
    assert weight.abs().max() <= 1 / math.sqrt(64 * 9)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 64 * 9), rel=0.02)
