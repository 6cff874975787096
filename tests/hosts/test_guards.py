"""What would rewrite an adapted module is refused by name."""

from __future__ import annotations

import pytest
from torch import nn

import convpeft


@pytest.mark.parametrize(
    "method", ["fuse", "fuse_convs", "reparameterize", "switch_to_deploy", "convert_to_deploy", "deploy"]
)
def test_fusing_an_adapted_model_is_refused(method):
    class Fusing(nn.Sequential):
        pass

    setattr(Fusing, method, lambda self: "fused")
    model = nn.Sequential(Fusing(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1))
    convpeft.inject(model, {"rules": [{"match": "1", "kind": "lora"}]}, name="elsewhere")
    assert getattr(model[0], method)() == "fused"  # no adapter below it
    convpeft.inject(model, {"rules": [{"match": "0.0", "kind": "lora"}]}, name="inside")
    with pytest.raises(convpeft.HostError, match=rf"Fusing\.{method}\(\) would rewrite .*convpeft\.merge\(model\)"):
        getattr(model[0], method)()
    convpeft.eject(model)
    assert getattr(model[0], method)() == "fused"
