"""Measure how long inject, eject, merge, save, load and swap take.

LoRA r=8 on every convolution of YOLO-World-v2, next to the same step of peft (as its ``PeftModel`` does it, but for
inject, where ``inject_adapter_in_model`` is faster) and LyCORIS. convpeft's merge works in float64 and probes each
layer, its files are checked against the base; the peers do neither. E.g. ``python -m benchmarks.handling --scale l``.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

import convpeft

from .commands import add_model_options, finish, parsed, parser, results_of, setting_of
from .kinds import injected, lora_spec
from .peers import attach_lycoris, peft_config, wrap_peft
from .reports import Table
from .runner import Case
from .worlds import Setting, another, base_model, batch_of, convs_of, inference_case, shaken

SPEC = lora_spec()
SECOND = "second"


def inject_cases(base: nn.Module) -> list[Case]:
    """Return putting adapters in, on a fresh copy each time; peft is the baseline."""
    from peft import get_peft_model, inject_adapter_in_model

    def copied() -> nn.Module:
        return another(base)

    names = convs_of(base)
    cases = [
        Case("peft", lambda model: inject_adapter_in_model(peft_config("lora", names), model), prepare=copied),
        Case("peft, PeftModel", lambda model: get_peft_model(model, peft_config("lora", names)), prepare=copied),
        Case("convpeft", lambda model: convpeft.inject(model, SPEC), prepare=copied),
    ]
    if find_spec("lycoris"):
        cases.append(Case("LyCORIS", lambda model: attach_lycoris(model), prepare=copied))
    return cases


def eject_cases(base: nn.Module) -> list[Case]:
    """Return taking adapters out."""
    ours, theirs = injected(another(base), SPEC), wrap_peft(another(base), "lora")
    return [
        Case("peft", lambda model: model.unload(), prepare=lambda: another(theirs)),
        Case("convpeft", lambda model: convpeft.eject(model), prepare=lambda: another(ours)),
    ]


def merge_cases(base: nn.Module) -> list[Case]:
    """Return merging adapters into the model at hand."""
    ours, theirs = shaken(injected(another(base), SPEC)), shaken(wrap_peft(another(base), "lora"))
    return [
        Case("peft", lambda model: model.merge_and_unload(), prepare=lambda: another(theirs)),
        Case("convpeft", lambda model: convpeft.merge(model, inplace=True), prepare=lambda: another(ours)),
    ]


def file_cases(base: nn.Module, folder: Path) -> tuple[list[Case], list[Case], list[str]]:
    """Return saving an adapter, loading it onto a bare copy, and the sizes of the files."""
    ours, theirs = shaken(injected(another(base), SPEC)), shaken(wrap_peft(another(base), "lora"))
    mine, other = folder / "ours.safetensors", folder / "peft"
    convpeft.save_adapter(ours, mine)
    theirs.save_pretrained(other)

    def load_peft(model: nn.Module) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, other)

    saving = [
        Case("peft", lambda: theirs.save_pretrained(other)),
        Case("convpeft", lambda: convpeft.save_adapter(ours, mine)),
    ]
    loading = [
        Case("peft", load_peft, prepare=lambda: another(base)),
        Case("convpeft", lambda model: convpeft.load_adapter(model, mine), prepare=lambda: another(base)),
    ]
    weights = sum(path.stat().st_size for path in other.glob("*.safetensors"))
    sizes = f"Files: peft {weights / 1e6:.2f} MB, convpeft {mine.stat().st_size / 1e6:.2f} MB."
    return saving, loading, [sizes]


def swap_of(model: nn.Module) -> Callable[[], None]:
    """Return a step that activates the other one of the adapters ``default`` and ``second`` in turn."""
    convpeft.inject(model, SPEC)
    convpeft.inject(model, SPEC, name=SECOND)
    model.eval()
    names = itertools.cycle(["default", SECOND])
    return lambda: convpeft.set_active(model, next(names))


def swap_cases(base: nn.Module, size: int, setting: Setting) -> list[Case]:
    """Return one forward pass as the baseline, and switching between two resident adapters."""
    theirs, names = wrap_peft(another(base), "lora"), itertools.cycle(["default", SECOND])
    theirs.add_adapter(SECOND, peft_config("lora", convs_of(base)))
    forward = inference_case("one forward pass", another(base), batch_of(1, size, setting)["img"], setting)
    return [
        forward,
        Case("peft, set_adapter", lambda: theirs.set_adapter(next(names)), repeat=10),
        Case("convpeft, set_active", swap_of(another(base)), repeat=10),
    ]


def main() -> None:
    """Measure and report."""
    made = parser(__doc__, rounds=7)
    add_model_options(made)
    made.add_argument("--size", type=int, default=640, help="of the image that a swap is compared on, pixels")
    options = parsed(made)
    setting = setting_of(options)
    base = base_model(options.scale, setting)
    where = f"YOLO-World-v2-{options.scale.upper()}, LoRA r=8 on every conv"

    def table(what: str, cases: list[Case], notes: list[str] | None = None) -> Table:
        return Table(f"{what}, {where}", tuple(results_of(cases, options)), notes=tuple(notes or ()))

    tables = [table("inject", inject_cases(base)), table("eject", eject_cases(base))]
    tables.append(table("merge", merge_cases(base)))
    with tempfile.TemporaryDirectory() as folder:
        saving, loading, sizes = file_cases(base, Path(folder))
        tables += [table("save", saving, sizes), table("load", loading)]
    tables.append(table(f"swap, next to a forward pass of 1×{options.size}²", swap_cases(base, options.size, setting)))
    finish("handling", options, tables)


if __name__ == "__main__":
    main()
