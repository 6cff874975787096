"""GraphModules of ``torch.fx``: they copy themselves, and their adapters and records come along."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import fx, nn
from torchvision.models import mobilenet_v3_small, resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import convpeft
from tests.cases import assert_relative


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x))))


class Inside(nn.Module):
    """A GraphModule as a part of another model."""

    def __init__(self):
        super().__init__()
        self.part, self.head = fx.symbolic_trace(Block()), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.part(x))


def extractor(make, node):
    return create_feature_extractor(make(weights=None), {node: "a"})


MODELS = {
    "traced": (lambda: fx.symbolic_trace(Block()), "{conv,out}"),
    "inside": (Inside, "part.conv"),
    "resnet": (lambda: extractor(resnet18, "layer1"), "layer1.**.conv1"),
    "mobilenet": (lambda: extractor(mobilenet_v3_small, "features.2"), "features.1.block.*.0"),
}


def tensor(output):
    return output["a"] if isinstance(output, dict) else output


def adapted(name: str, **more) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, match = MODELS[name]
    model = make().double().eval()
    convpeft.inject(model, {"rules": [{"match": match, "kind": "lora", "rank": 2}], **more}, name="a")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(1, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_merges(name, inplace):
    model, x = adapted(name)
    expected = tensor(model(x))
    with convpeft.disabled(model):
        assert not torch.equal(tensor(model(x)), expected)
    merged = convpeft.merge(model, inplace=inplace)
    assert_relative(tensor(merged(x)), expected)
    assert [module.training for module in merged.modules()].count(True) == 0
    assert not [key for key in merged.state_dict() if "convpeft" in key]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_copy_keeps_adapters_and_names(name, how):
    if how == "pickle" and name in ("resnet", "mobilenet"):
        pytest.skip("torchvision's extractors have no pickle of their own: they come back as plain GraphModules")
    model, x = adapted(name, norm="adapt")
    expected = tensor(model(x))
    buffer = io.BytesIO()
    if how == "pickle":
        torch.save(model, buffer)
        buffer.seek(0)
    twin = copy.deepcopy(model) if how == "deepcopy" else torch.load(buffer, weights_only=False)
    assert convpeft.active_adapters(twin) == ("a",)
    assert torch.equal(tensor(twin(x)), expected)
    with convpeft.disabled(twin):
        assert not torch.equal(tensor(twin(x)), expected)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(tensor(model(x)), expected)
    convpeft.eject(twin)
    assert not [key for key in twin.state_dict() if "convpeft" in key]


def test_what_only_unfreezes_is_kept_as_well():
    model = fx.symbolic_trace(Block()).eval()
    convpeft.inject(model, {"unfreeze": ["out"]}, name="a")
    with torch.no_grad():
        model.out.weight.add_(1)
    twin = copy.deepcopy(model)
    assert convpeft.active_adapters(twin) == ("a",)
    assert torch.equal(twin.out.weight, model.out.weight)
    convpeft.set_active(twin, None)
    assert not torch.equal(twin.out.weight, model.out.weight)


@torch.no_grad()
def test_an_adapter_on_the_graphs_own_output():
    model, x = fx.symbolic_trace(Block()).double().eval(), torch.randn(1, 3, 8, 8).double()
    bare = model(x)
    rule = {"match": "", "kind": "bottleneck", "channels": 4}
    convpeft.inject(model, {"rules": [rule]}, name="a")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    expected = model(x)
    assert not torch.equal(expected, bare)
    model.recompile()
    assert torch.equal(model(x), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    assert torch.equal(copy.deepcopy(twin)(x), expected)
    assert torch.equal(convpeft.eject(twin)(x), bare)
    assert torch.equal(model(x), expected)
    assert torch.equal(convpeft.eject(model)(x), bare)


@torch.no_grad()
def test_a_chain_on_the_graphs_own_output_is_refused():
    model = fx.symbolic_trace(Block()).double().eval()
    convpeft.inject(model, {"rules": [{"match": "", "kind": "rep_mona", "place": "output", "channels": 4, "rank": 2}]})
    with pytest.raises(
        convpeft.MergeError, match=r"torch\.fx GraphModule, whose copies lose what its graph does not name"
    ):
        convpeft.merge(model)


@torch.no_grad()
def test_ultralytics_moving_average_of_an_extractor():
    pytest.importorskip("ultralytics")
    from ultralytics.utils.torch_utils import ModelEMA

    model, x = adapted("resnet")
    average = ModelEMA(model, decay=0.5, tau=1)
    average.update(model)
    assert convpeft.active_adapters(average.ema) == ("a",)
    torch.testing.assert_close(tensor(average.ema(x)), tensor(model(x)))
