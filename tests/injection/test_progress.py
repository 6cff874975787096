"""The course of a training: statistics that adapt are held for the last share of the steps."""

from __future__ import annotations

import pytest
import torch

import convpeft
from tests.detector import LORA, detector, images

HOLDS = {"rules": [LORA], "norm": "adapt", "hold": 0.25}


def moves(model) -> bool:
    """Return whether a pass in training mode moves the statistics."""
    before = model.stem.norm.running_mean.clone()
    model.train()(images(8))
    return not torch.equal(model.stem.norm.running_mean, before)


class TestSetProgress:
    def test_statistics_are_held_for_the_last_share(self):
        model = detector()
        convpeft.inject(model, HOLDS)
        seen = []
        for step in range(8):
            convpeft.set_progress(model, step / 8)
            seen.append(moves(model))
        assert seen == [True] * 6 + [False] * 2
        assert model.stem.norm.weight.requires_grad  # its scale and shift go on
        learnt, x = model.stem.norm.running_mean.clone(), images()
        trained = model.eval()(x)
        convpeft.set_active(model, None)
        assert not torch.equal(model.stem.norm.running_mean, learnt)
        convpeft.set_active(model, "default")
        assert torch.equal(model(x), trained)

    def test_a_training_begun_again_adapts_again(self):
        model = detector()
        convpeft.inject(model, HOLDS)
        convpeft.set_progress(model, 1.0)
        assert not moves(model)
        convpeft.set_progress(model, 0.0)
        assert moves(model)

    @pytest.mark.parametrize("spec", [{"norm": "adapt"}, {"rules": [LORA]}, {"norm": "affine"}], ids=str)
    def test_specs_without_hold_want_nothing(self, spec):
        model = detector()
        convpeft.inject(model, spec)
        before = moves(model)
        convpeft.set_progress(model, 1.0)
        assert moves(model) == before == (spec.get("norm") == "adapt")

    def test_only_the_active_adapter_is_told(self):
        model = detector()
        convpeft.inject(model, HOLDS, name="a")
        convpeft.inject(model, HOLDS, name="b")
        convpeft.set_progress(model, 0.9)
        assert not moves(model)
        convpeft.set_active(model, "a")
        assert moves(model)

    def test_hold_is_kept_in_a_file(self, tmp_path):
        model = detector()
        convpeft.inject(model, HOLDS)
        path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
        convpeft.eject(model)
        convpeft.load_adapter(model, path)
        convpeft.set_progress(model, 0.8)
        assert not moves(model)

    @pytest.mark.parametrize("done", [-0.1, 1.5, True, "half", None, float("nan")])
    def test_no_share_is_refused(self, done):
        model = detector()
        convpeft.inject(model, HOLDS)
        with pytest.raises(convpeft.OptionError, match="done is the share of the steps"):
            convpeft.set_progress(model, done)
