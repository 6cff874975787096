"""LoCon files, both ways, beside the installed LyCORIS itself: outputs equal, merged too; what differs is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from torch import nn

import convpeft
from convpeft import Rule, Spec


class Small(nn.Module):
    """A strided convolution, a dilated one in groups, a depthwise and a pointwise one, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, dilation=2, padding=2, groups=2)
        self.depth_wise = nn.Conv2d(12, 12, 3, groups=12)
        self.mix = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.mix(self.depth_wise(self.grouped(self.stem(x)))).mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    return Small().double().eval()


def image(channels: int = 4, size: int = 24) -> torch.Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


def randomised(parameters) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
            parameter.dtype
        )


def lycoris_file(base: nn.Module, path: Path, **options) -> nn.Module:
    """Let LyCORIS adapt a copy of a model and write its file; return the adapted copy."""
    model = copy.deepcopy(base)
    LycorisNetwork.apply_preset({"target_module": [type(base).__name__], "target_name": []})
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2.0, algo="locon", bypass_mode=False, **options)
    network.apply_to()
    network.double()
    randomised(network.parameters())
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save_weights(str(path), torch.float64, {})
    model.network = [network]  # hold on to it, without making it a child
    return model.eval()


def loaded_by_lycoris(base: nn.Module, path: Path) -> nn.Module:
    model = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    network.apply_to()
    network.double().eval()
    model.network = [network]
    return model


@pytest.mark.parametrize("options", [{}, {"use_tucker": True}, {"rs_lora": True}], ids=str)
def test_an_adapter_of_lycoris_goes_in_and_comes_out_as_lycoris_computes_it(options, tmp_path):
    base, x = small(), image()
    theirs = lycoris_file(base, tmp_path / "theirs.safetensors", **options)
    expected = theirs(x)
    ours = copy.deepcopy(base)
    plan = convpeft.from_lycoris(ours, tmp_path / "theirs.safetensors")
    assert {layer.name for layer in plan.layers} == {"stem", "grouped", "depth_wise", "mix", "head"}
    assert not torch.allclose(base(x), expected)
    close(ours(x), expected)
    close(convpeft.merge(ours)(x), expected)
    convpeft.to_lycoris(ours, tmp_path / "ours.safetensors")
    close(loaded_by_lycoris(base, tmp_path / "ours.safetensors")(x), ours(x))
    back = copy.deepcopy(base)
    convpeft.from_lycoris(back, tmp_path / "ours.safetensors")
    close(back(x), ours(x), 1e-12)


def test_an_adapter_of_a_timm_model_travels(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=4).double().eval()
    model, x = copy.deepcopy(base), image(3, 64)
    rules = [Rule("blocks.[2-4].**", "lora", rank=8, alpha=3.0, only=["Conv2d"]), Rule("classifier", "lora", rank=2)]
    convpeft.inject(model, Spec(rules=rules), name="screw")
    randomised(p for p in model.parameters() if p.requires_grad)
    convpeft.to_lycoris(model, tmp_path / "a.safetensors", prefix="lora_unet")
    back = copy.deepcopy(base)
    convpeft.from_lycoris(back, tmp_path / "a.safetensors", prefix="lora_unet")
    assert not torch.allclose(base(x), model(x))
    close(back(x), model(x), 1e-12)
    convpeft.to_lycoris(model, tmp_path / "b.safetensors")
    close(loaded_by_lycoris(base, tmp_path / "b.safetensors")(x), model(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.a_0 = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(self.a_0(x))


@pytest.mark.parametrize(
    ("model", "spec", "match"),
    [
        (
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
            {"kind": "lora"},
            "0: LyCORIS pads with zeros",
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), {"kind": "lora", "dora": True}, "DoRA and a bias are no LoCon"),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), {"kind": "bottleneck"}, "kind 'bottleneck' on its output is no LoCon"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), {"kind": "lora"}, "takes Linear and what is built like Conv2d"),
        (Twice(), {"kind": "lora", "match": "a_0"}, "a.0, a_0 would have the same name"),
    ],
)
def test_what_lycoris_cannot_say_is_not_written(model, spec, match, tmp_path):
    convpeft.inject(model, {"rules": [{"match": "0", **spec}]})
    with pytest.raises(convpeft.HostError, match=match):
        convpeft.to_lycoris(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_unfrozen_tensors_are_not_dropped_silently(tmp_path):
    model = small()
    convpeft.inject(model, Spec(rules=[Rule("stem", "lora", rank=2)], unfreeze=["head"]))
    with pytest.raises(convpeft.HostError, match="it unfreezes head, and a LoCon file has no such tensors"):
        convpeft.to_lycoris(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.update({"lycoris_gone.alpha": torch.ones(())}),
            "of no layer of this model with the prefix 'lycoris'",
        ),
        (lambda t: t.update({"lycoris_head.hada_w1_a": torch.ones(1)}), "head: hada_w1_a is of no LoCon"),
        (lambda t: t.update({"lycoris_head.dora_scale": torch.ones(1)}), "head: dora_scale is of no LoCon"),
        (lambda t: t.pop("lycoris_stem.lora_up.weight"), "stem: lora_down or lora_up is missing"),
        (lambda t: t.update({"lycoris_stem.alpha": torch.ones(2)}), "stem: alpha has 2 numbers"),
        (lambda t: t.update({"lycoris_head.lora_down.weight": torch.ones(4, 9)}), r"head: lora_down is \(4, 9, 1, 1\)"),
        (lambda t: t.clear(), "it has no tensors"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, match, tmp_path):
    base, path = small(), tmp_path / "a.safetensors"
    lycoris_file(base, path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(convpeft.AdapterFileError, match=match):
        convpeft.from_lycoris(base, path)
    assert type(base) is Small
