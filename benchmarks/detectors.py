"""Take convpeft and peft through the same steps on every family of the zoo, and write the tables of docs/detectors.md.

``python -m benchmarks.detectors`` runs everything; ``--families timm-resnet smp-unet`` prints tables of those alone.
The families are in tests/detectors/zoo.py, the steps in tests/detectors/steps.py, where the tests run them too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import convpeft
from tests.detectors.steps import RANK, SPEC, STEPS, Bench, Convpeft, Library, built, every_layer, layers_of
from tests.detectors.zoo import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "detectors.md"
PACKAGES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "effdet", "peft")


class PeftLora:
    """peft's LoRA through the steps' eyes: every layer by name, or those it accepts when it refuses some.

    Args:
        all_layers: insist on every layer, so that a refusal shows.
    """

    def __init__(self, all_layers: bool = False) -> None:
        self.all_layers = all_layers

    def attach(self, model: nn.Module) -> nn.Module:
        """Return the model with peft's layers in it; the wrapper that peft needs later rides along."""
        from peft import LoraConfig, get_peft_model

        names = sorted(layers_of(model))
        if not self.all_layers:
            layers = {name: model.get_submodule(name) for name in names}
            names = [name for name, layer in layers.items() if RANK % getattr(layer, "groups", 1) == 0]
        self.wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
        return self._base(self.wrapped)

    def _base(self, wrapped: nn.Module) -> nn.Module:
        base = wrapped.get_base_model()
        base.__dict__["_peft_wrapped"] = wrapped
        return base

    def adapted(self, model: nn.Module) -> set[str]:
        """Return the names of the layers that have an adapter."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return both factors of every LoRA."""
        return [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    def save(self, model: nn.Module, path: Path) -> None:
        """Write peft's own folder beside ``path``."""
        model.__dict__["_peft_wrapped"].save_pretrained(path.parent / "peft")

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the model with the adapters of that folder."""
        from peft import PeftModel

        return self._base(PeftModel.from_pretrained(model, path.parent / "peft"))

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the base with the adapters merged."""
        return model.__dict__["_peft_wrapped"].merge_and_unload()

    def eject(self, model: nn.Module) -> nn.Module:
        """Return the base without adapters."""
        return model.__dict__["_peft_wrapped"].unload()


def convpeft_for(step: Callable[[Bench], None]) -> Library:
    """Return convpeft, for any step."""
    return Convpeft()


def peft_for(step: Callable[[Bench], None]) -> Library:
    """Return peft: on every layer where that is the question, else on those it accepts."""
    return PeftLora(all_layers=step is every_layer)


LIBRARIES: dict[str, Callable[[Callable[[Bench], None]], Library]] = {"convpeft": convpeft_for, "peft": peft_for}


def judge(name: str, library: str, step: Callable[[Bench], None]) -> str | None:
    """Return None where a library passes a step on a family, else why it does not, in one line."""
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(0)
            step(Bench(name, LIBRARIES[library](step), Path(folder)))
    except Exception as error:  # another library may raise anything; that is the result
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return None


Results = dict[tuple[str, str, str], str | None]


def run(names: Sequence[str]) -> Results:
    """Return what each library came to, by library, family and step."""
    results: Results = {}
    jobs = [(library, name, step) for name in names for library in LIBRARIES for step in STEPS]
    for library, name, step in tqdm(jobs, desc="steps"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[library, name, step] = judge(name, library, STEPS[step])
        if (library, step) == (list(LIBRARIES)[-1], list(STEPS)[-1]):
            built.cache_clear()
    return results


def tables(results: Results, library: str) -> str:
    """Return a library's results as a Markdown table, and its failures below."""
    names = list(dict.fromkeys(name for _, name, _ in results))
    lines = [f"| family | {' | '.join(STEPS)} |", f"| --- |{' :---: |' * len(STEPS)}"]
    for name in names:
        cells = ["yes" if results[library, name, step] is None else "**no**" for step in STEPS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    failures: dict[str, dict[str, list[str]]] = {}
    for name in names:
        for step in STEPS:
            reason = results[library, name, step]
            if reason is not None:
                failures.setdefault(_general(reason), {}).setdefault(name, []).append(step)
    if failures:
        lines += ["", "What failed:", ""]
    for reason, where in failures.items():
        by_steps: dict[tuple[str, ...], list[str]] = {}
        for name, steps in where.items():
            by_steps.setdefault(tuple(steps), []).append(name)
        places = "; ".join(f"*{', '.join(steps)}* of {', '.join(names)}" for steps, names in by_steps.items())
        lines.append(f"- {places}: `{reason}`")
    return "\n".join(lines)


def _general(reason: str) -> str:
    """Return a reason without what differs from family to family, its first two sentences at most."""
    reason = re.sub(r"difference [\d.e+-]+ at scale [\d.e+-]+", "difference", reason).replace("`", "'")
    reason = re.sub(r"groups=\d+", "groups=G", reason)
    return ". ".join(reason.split(". ")[:2]).rstrip(".")


def sizes(names: Sequence[str]) -> str:
    """Return what the spec adds to each family, as a Markdown table."""
    lines = [
        "| family | layers | base parameters | adapter parameters | share |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        plan = convpeft.plan(built(name).model, SPEC)
        lines.append(f"| {name} | {_size(plan)}")
    return "\n".join(lines)


def _size(plan: convpeft.Plan) -> str:
    share = 100 * plan.adapter_parameters / plan.base_parameters
    return f"{len(plan.layers)} | {plan.base_parameters:,} | {plan.adapter_parameters:,} | {share:.1f} % |"


def page(results: Results) -> str:
    """Return the whole of docs/detectors.md."""
    rank_4 = {"rules": [{"match": "**", "kind": "lora", "rank": 4}]}
    ssdlite = convpeft.plan(built("torchvision-ssdlite").model, rank_4)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    steps = "\n".join(
        f"- **{name}**: {(step.__doc__ or '').strip().replace('``', '`')}" for name, step in STEPS.items()
    )
    return f"""# Detectors

`python -m benchmarks.detectors` wrote this page. Each family is built offline with random weights, in its smallest
usual size, and taken through the steps that the tests run (`tests/detectors`). The whole spec is one rule:

<!-- spec -->
```yaml
version: 1
rules:
  - {{match: "**", kind: lora, rank: {RANK}}}
```

{steps}

Versions: {versions}.

## convpeft

{tables(results, "convpeft")}

## peft

`peft`'s LoRA of the same rank in the same run. Where it refuses some layers, only *every layer* counts that; the other
steps run with an adapter on the layers it accepts (those whose groups divide the rank). It leaves BatchNorm to the
training loop, so statistics move in training mode.

{tables(results, "peft")}

## Sizes

What the one rule adds at rank {RANK}. A depthwise layer's adapter is about as large as the layer, at any rank, so depthwise
families pay a floor. SSDLite at rank 4: {ssdlite.adapter_parameters:,} adapter parameters beside
{ssdlite.base_parameters:,}, {100 * ssdlite.adapter_parameters / ssdlite.base_parameters:.1f} %.

{sizes(list(FAMILIES))}
"""


def main() -> None:
    """Run the families asked for; write the page when that is all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="print the tables of these alone")
    chosen = parser.parse_args().families
    torch.set_num_threads(1)
    names = chosen or list(FAMILIES)
    missing = {package for name in names for package in FAMILIES[name].missing}
    if missing:
        parser.error(f"not installed: {', '.join(sorted(missing))}; pip install 'convpeft[detectors]'")
    results = run(names)
    if chosen:
        for library in LIBRARIES:
            print(f"{library}\n\n{tables(results, library)}\n")
        return
    PAGE.write_text(page(results), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
