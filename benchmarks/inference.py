"""Measure how long a forward pass takes: the bare base, with adapters, merged in each form.

YOLO-World-v2 in eval mode without gradients. The base runs twice, as two copies; what the second shows beside 1.00 is
the noise of the run. Adapters hold small random numbers, as if trained. Example: ``python -m benchmarks.inference``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

import convpeft

from .commands import add_batch_options, add_model_options, finish, parsed, parser, setting_of
from .kinds import LAST_CONVS, NECK_BLOCKS, injected, lora_spec, spec_on_blocks
from .peers import Attached, attach_lycoris, attach_peft, wrap_peft
from .reports import Table
from .runner import Case, Result, side_by_side
from .worlds import Setting, another, base_model, batch_of, inference_case, shaken, title_of

BASE, AGAIN = "base", "base, another copy"
ADAPTED, MERGED = "convpeft LoRA r=8 on every conv, adapted", "convpeft LoRA r=8 on every conv, merged"
FACTORED = "convpeft Rep-MoNA r=16 beside the neck's last convs, merged (factored)"
BESIDE = spec_on_blocks({"kind": "rep_mona", "rank": 16}, LAST_CONVS)
AFTER = spec_on_blocks({"kind": "rep_mona", "rank": 16, "place": "output"}, NECK_BLOCKS)


def adapted(model: nn.Module, spec: dict) -> nn.Module:
    """Return the model with trained adapters, in eval mode, in place."""
    return shaken(injected(model, spec)).eval()


def merged(model: nn.Module, spec: dict, form: str = "auto") -> nn.Module:
    """Return the model with trained adapters merged, in place."""
    return convpeft.merge(adapted(model, spec), form=form, inplace=True)


def fused(model: nn.Module) -> nn.Module:
    """Return the model as ultralytics deploys it: each BatchNorm folded into its convolution, in place."""
    from convpeft.integrations import ultralytics

    return ultralytics.fuse(model.eval())


def acceptance_choices() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return the cases that the acceptance table is about; each gets a copy of the base."""
    return {
        BASE: lambda model: model,
        AGAIN: lambda model: model,
        ADAPTED: lambda model: adapted(model, lora_spec()),
        MERGED: lambda model: merged(model, lora_spec()),
        FACTORED: lambda model: merged(model, BESIDE),
        "peft LoRA r=8 on every conv, adapted": lambda model: _plain(shaken(attach_peft(model, "lora").model)),
        "peft LoRA r=8 on every conv, merged": lambda model: _merged_by_peft(model),
    }


def choices() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return all cases."""
    found = acceptance_choices()
    if find_spec("lycoris"):
        found["LyCORIS LoCon r=8 on every conv, adapted"] = lambda model: _trained(attach_lycoris(model))
    return {
        **found,
        "peft DoRA r=8 on every conv, adapted": lambda model: _plain(shaken(attach_peft(model, "dora").model)),
        "convpeft LoRA r=8 with DoRA on every conv, adapted": lambda model: adapted(model, _dora_spec()),
        "convpeft Rep-MoNA r=16 beside the neck's last convs, adapted": lambda model: adapted(model, BESIDE),
        "convpeft Rep-MoNA r=16 beside the neck's last convs, merged (single)": lambda model: merged(
            model, BESIDE, "single"
        ),
        "convpeft Rep-MoNA r=16 on the neck's outputs, adapted": lambda model: adapted(model, AFTER),
        "convpeft Rep-MoNA r=16 on the neck's outputs, merged (factored)": lambda model: merged(model, AFTER),
        "base, norms folded": lambda model: fused(model),
        "convpeft LoRA r=8 on every conv, merged, norms folded": lambda model: fused(merged(model, lora_spec())),
    }


def _dora_spec() -> dict:
    spec = lora_spec()
    spec["rules"][0]["dora"] = True
    return spec


def _trained(attached: Attached) -> nn.Module:
    shaken(attached.model, attached.beside)
    for module in attached.beside:
        module.eval()
    return attached.model.eval()


def _plain(model: nn.Module) -> nn.Module:
    return model.eval()


def _merged_by_peft(model: nn.Module) -> nn.Module:
    return shaken(wrap_peft(model, "lora")).merge_and_unload().eval()


def measured(
    base: nn.Module,
    wanted: dict[str, Callable[[nn.Module], nn.Module]],
    images: torch.Tensor,
    setting: Setting,
    *,
    rounds: int,
    warm_up: int = 2,
    extra: tuple[Case, ...] = (),
) -> list[Result]:
    """Return the wanted cases side by side, each on a copy of the base; the first is the baseline."""
    cases = [inference_case(name, make(another(base)), images, setting) for name, make in wanted.items()]
    return side_by_side([*cases, *extra], rounds=rounds, warm_up=warm_up, seed=setting.seed)


def main() -> None:
    """Measure and report."""
    made = parser(__doc__, rounds=15)
    add_model_options(made)
    add_batch_options(made, images=1, size=640)
    options = parsed(made)
    setting = setting_of(options)
    images = batch_of(options.images, options.size, setting)["img"]
    found = measured(
        base_model(options.scale, setting), choices(), images, setting, rounds=options.rounds, warm_up=options.warm_up
    )
    where = title_of(options.scale, options.images, options.size)
    finish("inference", options, [Table(f"One forward pass, {where}", tuple(found))])


if __name__ == "__main__":
    main()
