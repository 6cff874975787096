"""From a spec and a model to a plan: what each module would get. Finds every problem; touches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..adapters.options import AdapterOptions, read_options
from ..adapters.registry import adapter_class
from ..errors import PatternError, SpecError, raise_problems, shown
from ..hosts.model import whole
from ..hosts.modules import is_batchnorm_like, is_within
from ..hosts.slots import base_class
from .bypasses import bypassed
from .globs import compile_glob
from .plan import Plan
from .rules import is_whole
from .selection import Candidate, Selection
from .sites import Sites, Wanted, half_shared, lazy_modules, own_parameters
from .spec import Spec, SpecLike, as_spec

FEW = 8  # images in a batch below which its moments are too noisy to train with: Wu and He, arXiv:1803.08494, fig. 1


def plan(model: nn.Module, spec: SpecLike, *, example_inputs: Any = None, batch_size: int | None = None) -> Plan:
    """Return what ``inject`` would do, printable; the model is not touched.

    Args:
        model: any module.
        spec: a ``Spec``, plain data, or the path of a spec file.
        example_inputs: inputs to run a copy of the model on where only that tells the channels of a block's output.
        batch_size: images that each process will train on in one forward pass; the plan warns where that is too few for the
            norm policy, and says which to take.

    Raises:
        SpecError: all problems of the spec at once (a subclass when all are of one sort).
        StateError: if a part of the model has adapters of its own.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> plan(model, {"rules": [{"match": "0", "kind": "lora", "rank": 2}]}).adapter_parameters
        70
    """
    return make_plan(whole(model), as_spec(spec), example_inputs, batch_size)


def make_plan(root: nn.Module, spec: Spec, example_inputs: Any = None, batch_size: int | None = None) -> Plan:
    """Return the plan of a spec for the module that is to hold the records.

    Raises:
        SpecError: all problems at once (a ``PatternError`` when all are of patterns, and so on).
    """
    heading = f"cannot plan for this {base_class(root).__name__}"
    selection = Selection(root, spec)
    modules = {name: candidate.module for name, candidate in selection.by_name.items()}
    lazy = lazy_modules(modules)
    if lazy:
        raise SpecError(f"{heading}: {lazy}")
    selection.deal()
    sites = Sites(root, _wanted(selection), bypassed(modules.values()), example_inputs)
    problems = [*selection.check.problems, *selection.problems, *map(SpecError, sites.problems)]
    owned = _unfrozen(selection, problems)
    raise_problems([*problems, *map(SpecError, half_shared(modules, {name: modules[name] for name in owned}))], heading)
    base = {id(p): p.numel() for module in modules.values() for p in own_parameters(module)}
    trained = {id(p): p.numel() for name in owned for p in own_parameters(modules[name]) if p.is_floating_point()}
    return Plan(
        base_class(root).__name__,
        tuple(sites.layers),
        owned,
        tuple(selection.shadowed),
        tuple(selection.left),
        spec.norm,
        sum(base.values()),
        sum(trained.values()),
        spec.to_dict(),
        tuple(_batch_warnings(spec, batch_size, len(owned))),
    )


def _batch_warnings(spec: Spec, batch_size: int | None, owned: int) -> Iterator[str]:
    """Yield what speaks against training a spec with batches of so many images.

    Raises:
        SpecError: if that is no number of images.
    """
    if batch_size is not None and (not is_whole(batch_size) or batch_size < 1):
        raise SpecError(f"batch_size is a whole number of images above 0, not {shown(batch_size)}")
    if batch_size is not None and batch_size < FEW and spec.norm == "adapt" and owned:
        yield (
            f"norm: adapt with batches of {batch_size}, fewer than {FEW}: every step normalises with the moments of so few images. "
            "Take norm: affine, and convpeft.calibrate(model, batches) before the training and after it."
        )


def _wanted(selection: Selection) -> list[Wanted]:
    """Return the adapters that the rules ask for."""
    options: dict[int, AdapterOptions] = {}
    wanted: list[Wanted] = []
    for candidate, number, rule, place in selection.chosen:
        if number not in options:
            read, _ = read_options(rule.kind, adapter_class(rule.kind).Options, rule.options)
            assert read is not None  # a rule with problems is dealt nothing
            options[number] = read
        wanted.append(
            Wanted(
                candidate.name,
                candidate.module,
                f"rule {number}: ",
                rule.kind,
                place,
                options[number],
                number,
                float(rule.lr_mult),
                rule.output,
                rule.channels,
                up_mult=None if rule.up_mult is None else float(rule.up_mult),
            )
        )
    return wanted


def _unfrozen(selection: Selection, problems: list[SpecError]) -> dict[str, float]:
    """Return the modules with tensors of their own that train along, with their relative learning rates.

    Args:
        selection: of the spec's patterns.
        problems: takes what is wrong.
    """
    owned: dict[str, float] = {}
    for number, entry in enumerate(selection.spec.entries, 1):
        label, earlier = f"unfreeze {number}", set(owned)
        if label in selection.check.unresolved:
            continue
        before = len(selection.problems)
        resolved = selection.resolved(entry.match)
        excluded = [compile_glob(pattern[1:]) for _, pattern in resolved if pattern.startswith("!")]
        for written, _, matched in selection.select(entry.match, label):
            below = [
                each
                for each in selection.candidates
                if _trains(each.module) and any(_is_below(each, top) for top in matched)
            ]
            names = [each.name for each in below if not any(map(each.matched_by, excluded))]
            if not names:
                problems.append(
                    PatternError(f"{label}: nothing that {shown(written)} matches has parameters to unfreeze")
                )
            elif earlier.issuperset(names):
                problems.append(
                    PatternError(
                        f"{label}: {shown(written)} gets nothing, because earlier unfreeze entries already took all of it"
                    )
                )
            for name in names:
                owned.setdefault(name, 1.0 if label in selection.check.unsound else float(entry.lr_mult))
        problems += selection.problems[before:]
    if selection.spec.norm in ("affine", "adapt"):
        for candidate in selection.candidates:
            if is_batchnorm_like(candidate.module):
                owned.setdefault(candidate.name, 1.0)
    return owned


def _is_below(candidate: Candidate, top: Candidate) -> bool:
    return any(is_within(name, above) for name in candidate.names for above in top.names)


def _trains(module: nn.Module) -> bool:
    return any(parameter.is_floating_point() for parameter in own_parameters(module))
