"""The channels of an output, observed: their axis, their number, and what no adapter can work on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft import SpecError
from tests.detector import Untouched, scrambled
from tests.planning.refusals import refused


def rule(match: str, kind: str = "lora", **options):
    return {"rules": [{"match": match, "kind": kind, "place": "output", **options}]}


def geometry(model: nn.Module, match: str, **options):
    """Return the channels of the planned site and whether they are the last axis; the model stays as it is."""
    before = Untouched(model)
    (layer,) = convpeft.plan(model, rule(match, **options.pop("rule", {})), **options).layers
    before.check()
    return layer.site.geometry.out_channels, layer.site.geometry.linear


class Normed(nn.LayerNorm):
    """Normalises the channels of an image, as ConvNeXt's norms do, each codebase in a way of its own."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Scaled(nn.Module):
    """A root-mean-square norm over the last axis that is no class of torch's."""

    def __init__(self, channels):
        super().__init__()
        self.normalized_shape, self.weight = (channels,), nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class LastAxis(nn.Module):
    """Takes an image and gives it with the channels last, as Swin's stages do."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 2, 2), nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class Steps(nn.Sequential):
    """A Sequential with a forward of its own, which the last step does not decide."""

    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1)


class Needs(nn.Module):
    """A detector whose forward takes more than an image."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, images, targets):
        return self.block(images), targets


class TestAxis:
    @pytest.mark.parametrize(
        ("block", "expected"),
        [
            (lambda: Normed(8), (8, False)),
            (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Normed(8), nn.GELU()), (8, False)),
            (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)), (8, False)),
            (lambda: nn.LayerNorm(8), (8, True)),
            (lambda: Scaled(8), (8, True)),
            (lambda: LastAxis(), (8, True)),
            (lambda: LastAxis(64), (64, True)),
            (lambda: Steps(nn.Conv2d(3, 8, 1)), (8, True)),
            (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(7)), (8, False)),
            (lambda: nn.Sequential(nn.Conv2d(3, 7, 1), nn.AdaptiveAvgPool2d(1)), (7, False)),
            (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), Transposed()), (8, True)),
        ],
    )
    def test_is_where_the_channels_stay_whatever_the_size(self, block, expected):
        assert geometry(nn.ModuleDict({"block": block()}).eval(), "block") == expected
        assert geometry(Needs(block()).eval(), "block") == expected

    @pytest.mark.parametrize("height", [8, 12])
    def test_an_adapter_works_on_the_channels_not_on_the_width(self, height):
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Normed(8))).eval()
        convpeft.inject(model, rule("0", "bottleneck", reduction=2))
        scrambled(model)
        adapter, x = model[0].convpeft.default, torch.randn(2, 3, height, 8)
        with convpeft.disabled(model):
            z = model(x)
        assert torch.equal(model(x), z + adapter(z))
        assert adapter(z)[:, :, :2].sub(adapter(z[:, :, :2])).abs().max() < 1e-6  # each pixel by itself

    @pytest.mark.parametrize(
        ("block", "axis"),
        [
            (lambda: nn.Conv1d(3, 8, 1), "channels on axis 1"),
            (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()), "channels on axis 1"),
            (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8)), "channels on axis 1"),
            (lambda: nn.Conv3d(3, 8, 1), "channels on axis 1"),
            (lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), nn.ReLU()), "channels on axis 1"),
            (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2)), "channels on axis 1"),
        ],
    )
    def test_what_no_adapter_can_work_on_is_refused(self, block, axis):
        text = rf"cannot take an adapter on its output: its output had the shape .* with the {axis}.*\(N, C, H, W\)"
        refused(rule("block"), SpecError, text, Needs(block()).eval())

    def test_a_norm_over_whole_images_takes_the_axis_of_the_layer_before_it(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm([8, 64, 64])).eval()
        assert geometry(model, "1", example_inputs=torch.randn(2, 3, 64, 64)) == (8, False)

    def test_channels_of_a_rule_choose_among_axes_that_do_not_show(self):
        block = nn.ModuleDict({"block": Constant(5, 7, 9)})
        text = r"its output had the shape \(2, 5, 7, 9\), and which axis is the channels does not show"
        refused(rule("block"), SpecError, text, Called(block), example_inputs=torch.zeros(2, 1))
        for channels, expected in ((5, (5, False)), (9, (9, True))):
            found = geometry(Called(block), "block", rule={"channels": channels}, example_inputs=torch.zeros(2, 1))
            assert found == expected

    def test_a_file_of_another_axis_is_refused(self, tmp_path):
        model = nn.ModuleDict({"norm": nn.LayerNorm(8)})
        convpeft.inject(model, rule("norm"))
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        other = nn.ModuleDict({"norm": Normed(8)})
        before = Untouched(other)
        with pytest.raises(convpeft.AdapterFileError, match=r"norm \(Normed\): .* not the same: linear"):
            convpeft.load_adapter(other, path)
        before.check()

    def test_hooks_of_the_user_see_no_probe(self):
        model, seen = Needs(LastAxis()).eval(), []
        for module in model.modules():
            module.register_forward_hook(lambda *args: seen.append(args))
            module.register_forward_pre_hook(lambda *args: seen.append(args))
        assert geometry(model, "block") == (8, True)
        assert geometry(model, "block", example_inputs=(torch.randn(1, 3, 16, 16), 0)) == (8, True)
        assert not seen

    def test_random_numbers_are_as_before(self):
        model = Needs(Noisy()).eval()
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        assert (
            geometry(model, "block", example_inputs=(torch.randn(1, 3, 8, 8, generator=torch.Generator()), 0))[0] == 8
        )
        assert torch.equal(torch.rand(3), expected)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        return self.conv(x + torch.rand_like(x))


class Constant(nn.Module):
    """Gives the same shape whatever comes in."""

    def __init__(self, *shape):
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, *shape))

    def forward(self, x):
        return self.values.expand(len(x), -1, -1, -1)


class Called(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.block = parts["block"]

    def forward(self, x):
        return self.block(x)


class TestAlone:
    """Blocks of models that no image runs on."""

    class Residual(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.one, self.two = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 3, padding=1)

        def forward(self, x):
            return x + self.two(self.one(x).relu())

    class Attends(nn.Module):
        """A layer of a transformer that needs a mask."""

        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, tokens, mask, *, positions):
            assert mask is None
            assert positions is None
            return tokens + self.mix(self.norm(tokens)), None

    class LaterFirst(nn.Module):
        """Runs its layers in another order than it has them in."""

        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Conv2d(6, 5, 1), nn.Conv2d(4, 6, 1)

        def forward(self, x):
            return self.last(self.first(x))

    class Gate(nn.Module):
        """A spatial attention: runs on any number of channels, so alone it does not say how many it has."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 3, padding=1)

        def forward(self, x):
            return x * self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)).sigmoid()

    def test_tell_their_channels(self):
        assert geometry(Needs(self.Residual(7)), "block") == (7, False)
        assert geometry(Needs(self.Attends()), "block", rule={"output": 0}) == (16, True)
        assert geometry(Needs(self.LaterFirst()), "block") == (5, False)
        assert geometry(Needs(nn.Sequential(self.Residual(4), nn.PixelShuffle(2))), "block") == (1, False)

    def test_that_take_any_number_of_channels_are_asked_about(self):
        refused(rule("block"), SpecError, r"could not be found out .*example_inputs=", Needs(self.Gate()))
        whole = nn.Sequential(nn.Conv2d(3, 6, 1), self.Gate())
        assert geometry(whole, "1") == (6, False)
        example = (torch.randn(1, 9, 8, 8), 0)
        assert geometry(Needs(self.Gate()), "block", example_inputs=example) == (9, False)

    def test_a_neck_of_several_maps_is_found_by_running_the_model(self):
        class Neck(nn.Module):
            def __init__(self):
                super().__init__()
                self.low, self.high = nn.Conv2d(8, 6, 1), nn.Conv2d(16, 6, 1)

            def forward(self, maps):
                return {"low": self.low(maps[0]), "high": self.high(maps[1])}

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two, self.neck = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 16, 2, 2), Neck()

            def forward(self, x):
                one = self.one(x)
                return self.neck([one, self.two(one)])

        assert geometry(Model(), "neck", rule={"output": "high"}) == (6, False)
        text = r"without an entry 'middle'; there are: 'low', 'high'\)"
        refused(rule("neck", output="middle"), SpecError, text, Model())
        text = r"could not be found out \(the module returned a dict, not a tensor\)"
        refused(rule("neck"), SpecError, text, Model())

    def test_real_blocks(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
            backbone_config=transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
            ),
        )  # fmt: skip
        layer = type(transformers.DetrForObjectDetection(config).model.encoder.layers[0])(config).eval()
        spec_rule = {} if isinstance(_first(layer), torch.Tensor) else {"output": 0}
        assert geometry(Needs(layer), "block", rule=spec_rule) == (32, True)
        torchvision = pytest.importorskip("torchvision")
        convnext = torchvision.models.convnext_tiny().features
        for number, channels in (("0", 96), ("1", 96), ("2", 192)):
            assert geometry(Needs(convnext[int(number)]), "block") == (channels, False)
        swin = torchvision.models.swin_t().features
        assert geometry(Needs(swin[0]), "block") == (96, True)
        assert geometry(Needs(swin[1][0]), "block") == (96, True)


def _first(layer):
    with torch.no_grad():
        return layer(torch.zeros(1, 4, 32), None, None)
