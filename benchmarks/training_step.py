"""Measure the time and memory of a training step next to full fine-tuning.

Forward pass, loss and backward pass of YOLO-World-v2 (ultralytics' model and loss, random weights, one random batch),
convpeft and its peers side by side. Needs ``convpeft[example]``, and lycoris-lora for its lines. Example:
``python -m benchmarks.training_step --scale l --rounds 5``.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.util import find_spec

from torch import Tensor, nn

from .commands import add_batch_options, add_model_options, finish, parsed, parser, results_of, setting_of
from .kinds import injected, specs
from .peers import Attached, attach_lycoris, attach_peft
from .reports import Table
from .runner import Case, Result
from .worlds import PLACES, Setting, another, base_model, batch_of, head_alone, title_of, training_case

FULL, HEAD = "full fine-tuning", "head alone"
LORA, NECK, REP_MONA = (
    "convpeft LoRA r=8, every conv",
    "convpeft LoRA r=8, neck and head",
    "convpeft Rep-MoNA r=8 3/5/7, neck and head",
)
PEER, PEER_NECK = "peft LoRA r=8, every conv", "peft LoRA r=8, neck and head"
PEFT_METHODS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa"}
Attach = Callable[[nn.Module], Attached]


def peers(every: bool) -> dict[str, tuple[str, Attach]]:
    """Return what attaches each peer by name, with the place it is compared at; the usual ones or all."""
    found: dict[str, tuple[str, Attach]] = {}
    for place, parts in PLACES.items():
        methods = tuple(PEFT_METHODS) if every or place != "every conv" else ("lora",)
        for method in methods:
            name = f"peft {PEFT_METHODS[method]} r=8, {place}"
            found[name] = (place, lambda model, method=method, parts=parts: attach_peft(model, method, parts))
        if find_spec("lycoris"):
            found[f"LyCORIS LoCon r=8, {place}"] = (place, lambda model, parts=parts: attach_lycoris(model, parts))
            if every:
                rebuilt = f"LyCORIS LoCon r=8 without bypass, {place}"
                found[rebuilt] = (place, lambda model, parts=parts: attach_lycoris(model, parts, bypass=False))
                loha = f"LyCORIS LoHa r=8, {place}"
                found[loha] = (
                    place,
                    lambda model, parts=parts: attach_lycoris(model, parts, bypass=False, algorithm="loha"),
                )
    return found


def choices(every: bool) -> dict[str, tuple[str, Attach]]:
    """Return what makes each case from a copy of the base by name, with its place; full fine-tuning is none of them."""
    found: dict[str, tuple[str, Attach]] = {HEAD: ("any", lambda model: Attached(head_alone(model)))}
    found.update(peers(every))
    for name, (place, spec) in specs(every).items():
        found[name] = (place, lambda model, spec=spec: Attached(injected(model, spec)))
    return found


def measured(
    base: nn.Module,
    wanted: dict[str, Attach],
    batch: dict[str, Tensor],
    setting: Setting,
    options: argparse.Namespace,
) -> list[Result]:
    """Return full fine-tuning and the wanted cases side by side, on copies of one base."""
    cases: list[Case] = [training_case(FULL, another(base), batch, setting)]
    for name, attach in wanted.items():
        made = attach(another(base))
        cases.append(training_case(name, made.model, batch, setting, made.beside))
    results = results_of(cases, options)
    del cases
    gc.collect()
    return results


def main() -> None:
    """Measure and report."""
    made = parser(__doc__, rounds=7)
    add_model_options(made)
    add_batch_options(made, images=4, size=256)
    made.add_argument("--all", action="store_true", help="every kind and every method instead of the usual ones")
    made.add_argument("--cases", nargs="+", default=["*"], help="only these, as globs over their names")
    options = parsed(made)
    setting = setting_of(options)
    wanted = {
        name: attach
        for name, (_, attach) in choices(options.all).items()
        if any(fnmatch(name, pattern) for pattern in options.cases)
    }
    base = base_model(options.scale, setting)
    batch = batch_of(options.images, options.size, setting)
    where = title_of(options.scale, options.images, options.size)
    table = Table(f"Training step, {where}", tuple(measured(base, wanted, batch, setting, options)))
    finish("training_step", options, [table])


if __name__ == "__main__":
    main()
