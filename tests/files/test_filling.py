"""A loaded adapter is made of the file's tensors, allocated once, and has everything else that its kind gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convpeft
from convpeft.adapters.base import Adapter, Site
from convpeft.adapters.options import AdapterOptions
from convpeft.files.fingerprints import digest, fingerprint
from tests.adapter_files import base, picture, trained
from tests.cases import bits, same_bits


class Scaled(Adapter):
    """A shift with every sort of state: saved, not saved, in an attribute, and one parameter under two names."""

    places = ("parallel", "output")
    Options = AdapterOptions

    def __init__(self, site: Site, options: AdapterOptions) -> None:
        super().__init__(site, options)
        channels = site.geometry.out_channels
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.again = self.shift
        self.register_buffer("steps", torch.zeros(1))
        self.extend(channels)

    def extend(self, channels: int) -> None:
        """Add nothing; subclasses do."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the update."""
        return (self.shift + self.again) * self.factor() + 0 * x[:, :1].mean()

    def factor(self) -> Tensor | float:
        """Return what the shift is multiplied by."""
        return 1.0


class Unsaved(Scaled):
    """Its factor is a buffer that no state_dict has."""

    def extend(self, channels: int) -> None:
        self.register_buffer("ramp", torch.arange(1.0, channels + 1).view(-1, 1, 1), persistent=False)

    def factor(self) -> Tensor:
        return self.ramp


class Hidden(Scaled):
    """Its factor is a tensor in a list in an attribute."""

    def extend(self, channels: int) -> None:
        self.held = [torch.full((channels, 1, 1), 3.0)]

    def factor(self) -> Tensor:
        return self.held[0]


class Marked(Scaled):
    """Its parameter carries a mark, as some optimisers and trainers look for."""

    def extend(self, channels: int) -> None:
        self.shift.no_decay = True


@pytest.fixture(params=[Scaled, Unsaved, Hidden, Marked])
def kind(request, clean_registry) -> type[Adapter]:
    """A kind from outside, registered for one test."""
    convpeft.register_adapter("state")(request.param)
    return request.param


def test_every_sort_of_state_is_there_after_a_load(kind, tmp_path):
    model = trained(base(), {"rules": [{"match": "stem", "kind": "state", "place": "output"}]})
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    fresh = base()
    convpeft.load_adapter(fresh, path)
    assert torch.equal(fresh(picture()), model(picture()))
    adapter = fresh.stem.convpeft["screw"]
    assert adapter.again is adapter.shift
    assert hasattr(adapter.shift, "no_decay") == (kind is Marked)
    assert not any(t.is_meta for t in (*fresh.parameters(), *fresh.buffers()))


def test_each_tensor_has_memory_of_its_own_and_the_files_numbers(tmp_path):
    model = trained(base())
    path = convpeft.save_adapter(model, tmp_path / "a.safetensors")
    fresh = base()
    convpeft.load_adapter(fresh, path)
    tensors = [*fresh.parameters(), *fresh.buffers()]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    Path(path).write_bytes(b"")  # nobody reads it any more
    assert same_bits(bits(model), bits(fresh))


def test_loading_does_not_touch_the_random_numbers(tmp_path):
    path = convpeft.save_adapter(trained(base()), tmp_path / "a.safetensors")
    fresh = base()
    state = torch.random.get_rng_state()
    convpeft.load_adapter(fresh, path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_digests_made_side_by_side_are_those_made_in_turn():
    model = base()
    found = fingerprint(model)
    for name, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        own = [(key, t) for key, t in own.items() if t is not None and key != "num_batches_tracked"]
        assert (found[name] == digest(own)) if own else (name not in found)
