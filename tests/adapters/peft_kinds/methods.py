"""The methods of peft that are tested, with options, the layers each serves, and models adapted with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convpeft
from convpeft.adapters.peft_kinds import layers
from tests.cases import LAYERS, LINEARS, TRANSPOSED, Variant, named, net

METHODS = {
    "loha": {"r": 2, "alpha": 3},
    "lokr": {"r": 2, "decompose_factor": 2, "use_effective_conv2d": True},
    "hira": {"r": 3},
    "ia3": {},
    "hra": {"r": 4},
    "boft": {"boft_block_size": 2},
    "oft": {"r": 2, "oft_block_size": 0},
    "lora": {"r": 2, "lora_alpha": 5},
}
LINEAR_ONLY = {
    "vera": {"r": 3},
    "randlora": {"r": 2},
    "gralora": {"r": 4, "gralora_k": 2},
    "waveft": {"n_frequency": 7},
    "fourierft": {"n_frequency": 7, "init_weights": True},
}


def serves(method: str, layer: nn.Module) -> bool:
    """What the installed peft can do, by its own words and by what PEERS measured of it."""
    if isinstance(layer, nn.Linear):
        return True
    square, pointwise = layer.kernel_size[0] == layer.kernel_size[1], layer.kernel_size == (1, 1)
    return {
        "loha": True,
        "lokr": True,
        "ia3": True,
        "hira": layer.groups == 1,
        "lora": layer.groups == 1,
        "hra": layer.groups == 1 and square,
        "boft": layer.groups == 1 and square,
        "oft": layer.groups == 1 and pointwise,
    }[method]


def variant(method: str) -> Variant:
    return Variant(f"peft:{method}", "parallel", {**METHODS, **LINEAR_ONLY}[method])


PAIRS = [(case, variant(method)) for method in METHODS for case in LAYERS if case not in TRANSPOSED]
SERVED = [pair for pair in PAIRS if serves(pair[1].kind.removeprefix("peft:"), pair[0].build())]
SERVED += [(case, variant(method)) for method in LINEAR_ONLY for case in LINEARS]
REFUSED = [pair for pair in PAIRS if pair not in SERVED]
IN_SHORT = pytest.mark.parametrize("kind", named([variant(method) for method in METHODS]))


def shaken(case, *kinds, dtype=torch.float64):
    """Return the net with adapters off their start by a little: OFT's series needs small steps."""
    model = net(case, dtype)
    for number, kind in enumerate(kinds):
        convpeft.inject(model, {"rules": [kind.rule]}, name="ab"[number])
    convpeft.set_active(model, list("ab"[: len(kinds)]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "convpeft" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))
    return model


def merged_by_peft(layer: nn.Module, adapter) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias as peft's own merge makes them of a plain layer of the same shape."""
    linear = isinstance(layer, nn.Linear)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None) if linear else nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, bias=layer.bias is not None
    )  # fmt: skip
    plain = plain.double()
    plain.load_state_dict({key: layer.state_dict()[key] for key in plain.state_dict()})
    wrapped = layers.wrap(adapter.method, adapter.options.settings(), plain).double()
    missing, unexpected = wrapped.load_state_dict(adapter.layer.state_dict(), strict=False)
    assert not unexpected
    assert all("base_layer" in key for key in missing)
    wrapped.merge()
    base = wrapped.get_base_layer()
    return base.weight.detach(), None if base.bias is None else base.bias.detach()
