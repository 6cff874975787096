"""Layers that somebody reads past: ``inject`` refuses those it can know, ``check`` finds the others by running."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import convpeft
from convpeft.planning.bypasses import weight_readers

LORA = {"match": "layer", "kind": "lora"}
ON_PARENT = "itself and would bypass the adapter; put the adapter on the parent's output instead"


class Parent(nn.Module):
    """Holds a layer; what subclasses do with it is the case."""

    weight_scale: float | None = None
    fused = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def helped(self, x):
        return F.linear(x, self.layer.weight)

    def called(self, x):
        return self.layer(x)

    @property
    def own_weight(self):
        return self.layer.weight


class Functional(Parent):
    def forward(self, x):
        return F.linear(self.other(x), self.layer.weight, self.layer.bias)


class Transposed(Parent):
    def forward(self, x):
        return x @ self.layer.weight.T


class ThroughAName(Parent):
    def forward(self, x):
        layer = self.layer
        weight = layer.weight
        return F.linear(x, weight.to(x.dtype))


class ThroughAMethod(Parent):
    def forward(self, x):
        return self.helped(x) if self.training else self.helped(x).relu()


class ThroughAProperty(Parent):
    def forward(self, x):
        return F.linear(x, weight=self.own_weight)


class ByGetattr(Parent):
    def forward(self, x):
        return F.linear(x, getattr(self, "layer").weight)  # noqa: B009


class Inherited(Functional):
    def forward(self, x):
        return super().forward(x) + 1


class PlainForward(Parent):
    def forward(self, x):
        return F.linear(x, self._modules["layer"].weight) + self.layer._parameters["bias"]


class BranchTaken(Parent):
    def forward(self, x):
        if self.weight_scale is not None or not self.fused:
            return self.layer(x)
        return self.layer(x)


class FusedBranch(Parent):
    """As timm's BEiT: which of the two, an attribute tells."""

    def forward(self, x):
        if self.weight_scale is None:
            if not self.fused:
                return self.called(x)
            return F.linear(x, self.layer.weight)
        return self.layer(x)


READ = [Functional, Transposed, ThroughAName, ThroughAMethod, ThroughAProperty, ByGetattr, Inherited, FusedBranch]


class Describing(Parent):
    """Asks the weight all that may be asked without reading a number of it."""

    def forward(self, x):
        weight = self.layer.weight
        x = x.to(self.layer.weight.dtype).to(weight.device).type_as(self.layer.weight).to(weight)
        if self.layer.weight is not None and isinstance(self.layer.weight, torch.Tensor) and hasattr(self, "layer"):
            x = x.reshape(-1, self.layer.weight.shape[1], *self.layer.weight.size()[2:])
        return self.layer(x) + torch.zeros_like(weight).sum()


class WithStaticMethod(Parent):
    """What a static method calls its first argument is not the module."""

    @staticmethod
    def scaled(block, x):
        return x * block.layer.weight.mean()

    def forward(self, x):
        return self.layer(self.scaled(self.other, x) if hasattr(self.other, "layer") else x)


class Looping(Parent):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
        return [layer.weight.dtype for layer in self.layers] and self.layers[-1](x)


def spec(match: str = "layer", **options) -> dict:
    return {"rules": [{"match": match, "kind": "lora", **options}]}


@pytest.mark.parametrize("owner", READ)
def test_a_layer_that_is_only_read_is_refused(owner):
    model, x = owner().eval(), torch.randn(2, 4)
    model(x)
    with pytest.raises(convpeft.SpecError, match=rf"its parent {owner.__name__} reads layer\.weight {ON_PARENT}"):
        convpeft.inject(model, spec())
    convpeft.inject(model, spec("", place="output"), example_inputs=x)
    assert convpeft.check(model, x).ok


@pytest.mark.parametrize("loop", [True, False])
def test_layers_that_are_read_in_a_loop_are_refused(loop):
    class Loop(Parent):
        def forward(self, x):
            for layer in self.layers:
                x = F.linear(x, layer.weight)
            return x

    class Index(Parent):
        def forward(self, x):
            return F.linear(F.linear(x, self.layers[0].weight), self.layers[-1].weight)

    with pytest.raises(convpeft.SpecError, match=rf"(?s)layers\.0 .*bypass.*layers\.1 .*reads layers\..*{ON_PARENT}"):
        convpeft.plan(Loop() if loop else Index(), spec("layers.*"))


@pytest.mark.parametrize("owner", [Describing, Looping, BranchTaken, WithStaticMethod])
def test_asking_a_weight_for_its_dtype_is_no_bypass(owner):
    model, x = owner().eval(), torch.randn(2, 4)
    assert weight_readers(model.modules()) == {}
    convpeft.inject(model, spec(["layer", "layers.*"]))
    report = convpeft.check(model, x)
    assert report.read_past == ()
    assert "layer: default" in report.called


def test_the_branch_that_an_attribute_chooses_counts():
    model = FusedBranch()
    model.fused = False
    assert weight_readers(model.modules()) == {}
    model.fused = True
    assert weight_readers(model.modules())[id(model.layer)].certain
    model.weight_scale = 2.0
    assert weight_readers(model.modules()) == {}


class ByForward(Parent):
    def forward(self, x):
        return F.linear(self.layer.forward(x), self.layer.weight)


class ByList(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.layer]

    def forward(self, x):
        return F.linear(self.steps[0](x), self.layer.weight)


class ByChildren(Parent):
    def forward(self, x):
        return F.linear(next(self.children())(x), self.layer.weight)


class ByItself(Parent):
    def forward(self, x):
        return F.linear(vars(self)["_modules"]["layer"](x), self.layer.weight)


@pytest.mark.parametrize("owner", [ByForward, ByList, ByChildren, ByItself])
def test_a_layer_that_may_be_called_is_not_refused(owner):
    """Read, and perhaps called in a way that only running tells; a merge does not rewrite it."""
    model, x = owner().eval(), torch.randn(2, 4)
    assert not weight_readers(model.modules())[id(model.layer)].certain
    convpeft.inject(model, spec())
    report = convpeft.check(model, x)
    assert (report.called, report.read_past) == (("layer: default",), ("layer: default",))
    assert convpeft.plan_merge(model).refused.keys() == {"layer"}


def test_a_forward_without_a_source_is_believed():
    scope: dict = {"Parent": Parent, "F": F}
    exec("class Made(Parent):\n    def forward(self, x):\n        return F.linear(x, self.layer.weight)", scope)
    model, x = scope["Made"]().eval(), torch.randn(2, 4)
    convpeft.inject(model, spec())
    assert convpeft.check(model, x).read_past == ("layer: default",)


def attention(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "swin_t":
        return torchvision.models.swin_transformer.ShiftedWindowAttention(8, [2, 2], [0, 0], 2)
    if name == "swin_v2_t":
        return torchvision.models.swin_transformer.ShiftedWindowAttentionV2(8, [2, 2], [0, 0], 2)
    if name == "beit":
        return timm.models.beit.Attention(8, 2, qkv_bias=True)
    if name == "eva":
        return timm.models.eva.EvaAttention(8, 2, qkv_bias=True, qkv_fused=True, scale_norm=False)
    return timm.models.swin_transformer_v2.WindowAttention(8, (2, 2), 2)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("swin_t", ["qkv", "proj"]),
        ("swin_v2_t", ["qkv", "proj"]),
        ("beit", ["qkv"]),
        ("eva", ["qkv"]),
        ("timm-swin-v2", ["qkv"]),
    ],
)
def test_attention_of_well_known_libraries_is_refused_where_it_reads_and_only_there(name, layers):
    model = attention(name).eval()
    for layer in layers:
        with pytest.raises(convpeft.SpecError, match=rf"reads {layer}\.weight {ON_PARENT}"):
            convpeft.plan(model, spec(layer))
    if "proj" not in layers:
        convpeft.plan(model, spec("proj"))


def test_layers_that_well_known_libraries_call_are_not_refused():
    """Of 400 layers, none is read past but what the parametrisations above say."""
    for model in (
        timm.create_model("vit_tiny_patch16_224", depth=1, pretrained=False),
        timm.create_model("fastvit_t8", pretrained=False),
        torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
        torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None),
    ):
        assert weight_readers(model.modules()) == {}


FAST = [("linear1", {}), ("linear2", {}), ("norm1", {"place": "output"}), ("norm2", {"place": "output"})]


@pytest.mark.parametrize(("layer", "options"), [*FAST, ("self_attn", {"place": "output", "output": 0})])
@pytest.mark.parametrize("subclass", [False, True])
def test_the_fast_path_of_an_encoder_layer_is_refused(layer, options, subclass):
    class Encoder(nn.TransformerEncoderLayer):
        def forward(self, src):
            return super().forward(src)

    model = (Encoder if subclass else nn.TransformerEncoderLayer)(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with pytest.raises(
        convpeft.SpecError, match=rf"its parent TransformerEncoderLayer reads {layer}\.\w*weight {ON_PARENT}"
    ):
        convpeft.inject(model, spec(layer, **options), example_inputs=x)
    convpeft.inject(model, spec("", place="output"), example_inputs=x)
    assert convpeft.check(model, x).ok


def test_an_attention_with_a_forward_of_its_own_is_taken_at_its_word():
    class Calls(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    model, x = Calls(4, 2), torch.randn(2, 4)
    convpeft.inject(model, spec("out_proj"))
    assert convpeft.check(model, x).ok


def test_an_adapter_file_is_refused_where_its_layer_is_read_past(tmp_path):
    class Calls(Parent):
        def forward(self, x):
            return self.layer(x)

    model = Calls()
    convpeft.inject(model, spec())
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    other = Functional()
    other.load_state_dict(convpeft.eject(model).state_dict())
    with pytest.raises(
        convpeft.AdapterFileError,
        match=r"layer \(Linear\) cannot host an adapter: its parent Functional reads layer\.weight itself",
    ):
        convpeft.load_adapter(other, path)
    assert "_convpeft_state" not in other.__dict__
