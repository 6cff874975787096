"""Measure how time and memory grow with model size, rank, resolution, and the number of adapters in the model.

The first three are training steps of LoRA beside full fine-tuning and peft. The last one puts 1 to 1,000 adapters into
one model and times a forward pass, a swap, and putting one more in and out again. Example:
``python -m benchmarks.growth --parts rank --ranks 4 16 64``.
"""

from __future__ import annotations

import argparse
import itertools

from torch import nn
from tqdm import tqdm

import convpeft

from .commands import add_model_options, finish, parsed, parser, setting_of
from .kinds import LAST_CONVS, injected, lora_spec, spec_on_blocks
from .peers import Attached, attach_peft, peft_config
from .reports import Table
from .runner import Case, side_by_side
from .training_step import Attach, measured
from .worlds import SCALES, Setting, another, base_model, batch_of, inference_case, title_of

PARTS = ("scale", "rank", "size", "residents")
RESIDENT_RANK = 4


def lora_choices(rank: int) -> dict[str, Attach]:
    """Return peft's LoRA and convpeft's on every convolution, and convpeft's on neck and head."""
    return {
        "peft LoRA, every conv": lambda model: attach_peft(model, "lora", rank=rank),
        "convpeft LoRA, every conv": lambda model: Attached(injected(model, lora_spec(rank=rank))),
        "convpeft LoRA, neck and head": lambda model: Attached(injected(model, lora_spec("neck and head", rank))),
    }


def training_table(
    axis: str, x: float, scale: str, size: int, rank: int, setting: Setting, options: argparse.Namespace
) -> Table:
    """Return one point of a curve: a training step of each choice."""
    base, batch = base_model(scale, setting), batch_of(options.images, size, setting)
    found = measured(base, lora_choices(rank), batch, setting, options)
    title = f"{title_of(scale, options.images, size)}, rank {rank}"
    return Table(title, tuple(found), axis=axis, x=x)


def by_scale(setting: Setting, options: argparse.Namespace) -> list[Table]:
    """Return a table for each model size; x is its millions of parameters."""
    tables = []
    for scale in options.scales:
        millions = sum(p.numel() for p in base_model(scale, setting).parameters()) / 1e6
        x = round(millions, 1)
        tables.append(training_table("parameters of the model, millions", x, scale, options.size, 8, setting, options))
    return tables


def by_rank(setting: Setting, options: argparse.Namespace) -> list[Table]:
    """Return a table for each rank."""
    return [training_table("rank", rank, options.scale, options.size, rank, setting, options) for rank in options.ranks]


def by_size(setting: Setting, options: argparse.Namespace) -> list[Table]:
    """Return a table for each image size."""
    return [
        training_table("side of an image, pixels", size, options.scale, size, 8, setting, options)
        for size in options.sizes
    ]


def one_more(model: nn.Module, spec: dict) -> None:
    """Put an adapter in and take it out."""
    convpeft.inject(model, spec, name="more")
    convpeft.eject(model, "more")


def by_residents(setting: Setting, options: argparse.Namespace) -> list[Table]:
    """Return a table for each number of adapters in one model; a bare copy's forward pass is the baseline."""
    crowd, tables = _Crowd(setting, options.size), []
    for count in options.residents:
        crowd.grow(count, peft=count <= options.peer_residents)
        found = side_by_side(crowd.cases(), rounds=options.rounds, warm_up=1, seed=options.seed)
        held = sum(p.numel() * p.element_size() for n, p in crowd.ours.named_parameters() if ".convpeft." in n)
        note = f"{held / 1e6:.2f} MB of adapter parameters, {held / 1e3 / count:.1f} kB each."
        where = f"LoRA r={RESIDENT_RANK} beside the neck's last convs, 1×{options.size}²"
        title = f"{count:,} adapters in YOLO-World-v2-N: {where}"
        tables.append(Table(title, tuple(found), axis="adapters in the model", x=count, notes=(note,)))
    return tables


class _Crowd:
    """A bare base, and two copies of it with the same growing number of adapters, convpeft's and peft's."""

    def __init__(self, setting: Setting, size: int) -> None:
        import peft

        self.setting, self.images = setting, batch_of(1, size, setting)["img"]
        self.base = base_model("n", setting).eval()
        self.ours, self.names = another(self.base), []
        self.spec = spec_on_blocks({"kind": "lora", "rank": RESIDENT_RANK}, LAST_CONVS)
        self.config = peft_config("lora", LAST_CONVS, RESIDENT_RANK)
        self.theirs, self.peers = peft.get_peft_model(another(self.base), self.config).eval(), ["default"]
        self.crowded = False

    def grow(self, count: int, *, peft: bool) -> None:
        """Put adapters in until there are ``count``; into peft's model too, or leave that alone from now on."""
        for number in tqdm(range(len(self.names), count), desc=f"inject up to {count}", disable=None):
            self.names.append(f"adapter-{number}")
            convpeft.inject(self.ours, self.spec, name=self.names[-1])
        self.ours.eval()
        self.crowded = not peft
        for number in range(len(self.peers), count if peft else 0):
            self.peers.append(f"adapter-{number}")
            self.theirs.add_adapter(self.peers[-1], self.config)

    def cases(self) -> list[Case]:
        """Return what is timed."""
        turn, back = itertools.cycle([self.names[0], self.names[-1]]), itertools.cycle([self.peers[0], self.peers[-1]])
        found = [
            inference_case("forward pass of the bare base", self.base, self.images, self.setting),
            inference_case("forward pass with one of the adapters", self.ours, self.images, self.setting),
            Case("convpeft, swap", lambda: convpeft.set_active(self.ours, next(turn)), repeat=5),
            Case("convpeft, put one more in and out", lambda: one_more(self.ours, self.spec)),
        ]
        if not self.crowded:
            found.append(Case("peft, swap", lambda: self.theirs.set_adapter(next(back)), repeat=5))
        return found


def main() -> None:
    """Measure and report."""
    made = parser(__doc__, rounds=3)
    add_model_options(made)
    made.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    made.add_argument("--images", type=int, default=2, help="in a batch")
    made.add_argument("--size", type=int, default=256, help="of an image where that is not what grows")
    made.add_argument("--scales", nargs="+", default=SCALES, choices=SCALES)
    made.add_argument("--ranks", nargs="+", type=int, default=(4, 8, 16, 32, 64))
    made.add_argument("--sizes", nargs="+", type=int, default=(128, 256, 384, 512))
    made.add_argument("--residents", nargs="+", type=int, default=(1, 10, 100, 1000))
    made.add_argument("--peer-residents", type=int, default=100, help="the most adapters that peft gets")
    options = parsed(made)
    setting = setting_of(options)
    parts = {"scale": by_scale, "rank": by_rank, "size": by_size, "residents": by_residents}
    tables = [table for part in options.parts for table in parts[part](setting, options)]
    finish("growth", options, tables)


if __name__ == "__main__":
    main()
