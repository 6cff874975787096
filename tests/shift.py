"""An adapter kind as a user would write it, registered by tests under the name ``shift``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convpeft import Adapter, AdapterOptions, Site


@dataclass(frozen=True)
class ShiftOptions(AdapterOptions):
    """Where the one parameter starts."""

    start: float = 0.0


class Shift(Adapter):
    """``f(z) = b``, one number for all pixels."""

    places = ("output",)
    Options = ShiftOptions
    merge_refusal = "written for a test"

    def __init__(self, site: Site, options: ShiftOptions) -> None:
        super().__init__(site, options)
        self.shift = nn.Parameter(torch.full((1,), options.start))

    def forward(self, z: Tensor) -> Tensor:
        return self.shift.expand_as(z)
