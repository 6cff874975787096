"""A trainer class of ultralytics that trains an adapter: mixed in front of the trainer of any task.

ultralytics builds the model that it trains, lets everything in it require gradients, averages it, saves it in half precision,
and fuses what it saved. Each of these has one method here that keeps the adapter, and the base as it is.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..adapters.base import Adapter
from ..errors import HostError, shortened
from ..files.loading import load_adapter
from ..files.saving import save_adapter
from ..hosts.model import AdaptedModel
from ..hosts.slots import Swapped
from ..hosts.wrappers import inside
from ..injection.auditing import audit
from ..injection.inject import eject, inject
from ..injection.switching import set_active
from ..injection.training import auxiliary_loss, param_groups
from ..planning.spec import Spec

_ALWAYS_FROZEN = ".dfl"  # ultralytics' fixed projection
_UNSUPPORTED = {"distill_model": "knowledge distillation", "quantize": "quantisation-aware training"}


class AdapterTrainer:
    """Mixin in front of a trainer class of ultralytics; see ``convpeft.integrations.ultralytics.trainer``.

    Attributes:
        spec, adapter_name, form, deployed: set by the class that is made from this one.
        adapter_files: where the adapter of the last and of the best epoch is.
    """

    spec: Spec
    adapter_name: str
    form: str
    deployed: Callable[[nn.Module, str], nn.Module]
    args: Any
    model: Any
    ema: Any
    wdir: Path
    last: Path
    best: Path

    @property
    def adapter_files(self) -> tuple[Path, Path]:
        """The adapter files of the last and of the best epoch, beside ``last.pt`` and ``best.pt``."""
        return self.last.with_suffix(".safetensors"), self.best.with_suffix(".safetensors")

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """Return the model of ultralytics' own method with the adapter in it; when a run is resumed, the adapter of that run.

        Raises:
            HostError: if a run without this adapter is to be resumed, or one with another spec.
        """
        wrong = [what for key, what in _UNSUPPORTED.items() if getattr(self.args, key, None)]
        if wrong:
            raise HostError(f"{' and '.join(wrong)} cannot train an adapter with this trainer: leave it out")
        adapted = AdaptedModel.find(weights) if isinstance(weights, nn.Module) else None
        base = weights if adapted is None else eject(copy.deepcopy(weights))
        model: nn.Module = super().get_model(cfg=cfg, weights=base, verbose=verbose)  # type: ignore[misc]
        if getattr(self, "resume", False):
            self._restore(model, adapted)
        else:
            self._save_base(model)
            inject(model, self.spec, name=self.adapter_name)
        _thaw(model)  # ultralytics does, with a warning for each parameter; build_optimizer freezes
        return model

    def _restore(self, model: nn.Module, adapted: AdaptedModel | None) -> None:
        """Give a new model the adapter of the run that is resumed, in place."""
        names = [] if adapted is None else list(adapted.state.adapters)
        if adapted is None or self.adapter_name not in names:
            raise HostError(
                f"{self.args.model} has no adapter {self.adapter_name!r} (it has: {', '.join(names) or 'none'}), so its run "
                "cannot be resumed with this trainer. Finished runs have none: their adapter is in best.safetensors"
            )
        if adapted.record(self.adapter_name).spec != self.spec.to_dict():
            raise HostError(f"the adapter in {self.args.model} was made by another spec: resume with the one it had")
        with tempfile.TemporaryDirectory() as folder:
            path = save_adapter(adapted.root, Path(folder) / "resumed.safetensors", name=self.adapter_name)
            load_adapter(model, path)

    def _save_base(self, model: nn.Module) -> None:
        """Write the base that the adapter is for, in its own dtype: a checkpoint that ``YOLO(...)`` opens."""
        if self._is_first():
            base = copy.deepcopy(model)
            base.names = self.data["names"]  # type: ignore[attr-defined]
            base.args = dict(vars(self.args))  # type: ignore[assignment]
            torch.save({"model": base, "train_args": dict(vars(self.args)), "epoch": -1}, self.wdir / "base.pt")

    def _is_first(self) -> bool:
        from ultralytics.utils import RANK

        return RANK in {-1, 0}

    def _hold(self) -> None:
        """Freeze the base and let exactly the adapter train, in place."""
        model = inside(self.model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        set_active(model, self.adapter_name)
        self.freeze_layer_names = [
            _ALWAYS_FROZEN
        ]  # freeze= has nothing left to freeze, and norms are the spec's matter

    def auto_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batch size that fits while only the adapter trains."""
        self._hold()
        return super().auto_batch(*args, **kwargs)  # type: ignore[misc]

    def build_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ultralytics' optimizer with the adapter's parameters only, at ``lr_mult`` times their group's rate."""
        from ultralytics.utils import LOGGER

        self._hold()
        if self.args.freeze:
            LOGGER.warning(
                f"convpeft: freeze={self.args.freeze} changes nothing: the base is frozen, the spec says what trains"
            )
        optimizer = super().build_optimizer(model, *args, **kwargs)  # type: ignore[misc]
        _regroup(optimizer, inside(model))
        report = audit(model, optimizer)
        LOGGER.info(f"convpeft: adapter {self.adapter_name!r}\n{report}")
        if type(optimizer).__name__ != "MuSGD":  # that one triples the rates of the class branches
            report.require_ok()
        return optimizer

    def _setup_train(self, *args: Any, **kwargs: Any) -> Any:
        """Set up as ultralytics does; then let auxiliary losses of adapters be part of the loss."""
        found = super()._setup_train(*args, **kwargs)  # type: ignore[misc]
        model = inside(self.model)
        adapted = AdaptedModel.of(model)
        if any(_has_loss(adapter) for _, adapter in adapted.adapters(self.adapter_name)):
            model.register_forward_hook(
                _with_auxiliary_loss
            )  # of this object, not of the average that was copied from it
        return found

    def save_model(self) -> Any:
        """Save as ultralytics does, the average in its own precision, and the adapter of it beside."""
        average = self.ema.ema
        _same_base(inside(self.model), average)
        average.__dict__["half"] = MethodType(
            _as_it_is, average
        )  # the base would be rounded, and a resumed run is on another one
        try:
            saved = super().save_model()  # type: ignore[misc]
        finally:
            average.__dict__.pop("half", None)
        if saved is not False:
            last, best = self.adapter_files
            save_adapter(average, last, name=self.adapter_name)
            if self.best_fitness == self.fitness:  # type: ignore[attr-defined]
                save_adapter(average, best, name=self.adapter_name)
        return saved

    def final_eval(self) -> Any:
        """Leave plain models in ``last.pt`` and ``best.pt``, and evaluate the best as ultralytics does."""
        for path in (self.last, self.best) if self._is_first() else ():
            if path.exists():
                found = torch.load(path, map_location="cpu", weights_only=False)
                key = "ema" if found.get("ema") is not None else "model"
                found[key] = type(self).deployed(found[key], self.form)
                torch.save(found, path)
        return super().final_eval()  # type: ignore[misc]


def _has_loss(adapter: Adapter) -> bool:
    return type(adapter).auxiliary_loss is not Adapter.auxiliary_loss


def _with_auxiliary_loss(model: nn.Module, args: Any, output: Any) -> Any:
    """Return the output of a pass that computed a loss with the auxiliary losses added, for each image as that loss is."""
    if not (model.training and args and isinstance(args[0], dict) and isinstance(output, tuple) and len(output) == 2):
        return output
    loss, items = output
    return loss.sum() + auxiliary_loss(model) * len(args[0]["img"]), items


def _as_it_is(model: nn.Module) -> nn.Module:
    """Return a model in the dtype that it has: stands in for ``half``, once."""
    model.__dict__.pop("half", None)
    return model


def _thaw(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _same_base(model: nn.Module, average: nn.Module) -> None:
    """Give an average the frozen parameters of its model, bit for bit, in place; averaging may have rounded them."""
    here = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in average.named_parameters():
            if name in here and not here[name].requires_grad:
                parameter.copy_(here[name])


def _regroup(optimizer: Any, model: nn.Module) -> None:
    """Let an optimizer hold the adapter's parameters only, in groups of one ``lr_mult`` each, in place.

    Each group keeps what ultralytics wrote into it: the kind of parameters decides about decay and the warm-up of biases.
    What ``param_groups`` does not decay is not decayed here either.
    """
    wanted = {
        id(parameter): (group["name"], group["lr_mult"], group["weight_decay"] > 0)
        for group in param_groups(model, lr=1.0, weight_decay=1.0)
        for parameter in group["params"]
    }
    groups: list[dict[str, Any]] = []
    for old in optimizer.param_groups:
        parts: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
        for parameter in old["params"]:
            if id(parameter) in wanted:
                parts.setdefault(wanted[id(parameter)], []).append(parameter)
        for (name, lr_mult, decays), parameters in parts.items():
            own = {**old, "params": parameters, "lr": old["lr"] * lr_mult, "lr_mult": lr_mult, "name": name}
            if not decays:
                kind = "bias" if old.get("param_group") == "bias" else "bn"
                own.update(weight_decay=0.0, param_group=kind)
            groups.append(own)
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


def base_trainer(base: Any, overrides: dict[str, Any]) -> Any:
    """Return the trainer class to put the adapter into.

    Args:
        base: a class; a ``YOLO`` (``RTDETR`` ...), whose task decides; or None, and then the task and the model that are
            trained decide.
        overrides: the arguments of the training.

    Raises:
        HostError: if there is no such trainer.
    """
    if isinstance(base, type):
        return base
    if base is not None:
        return base._smart_load("trainer")
    from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld
    from ultralytics.nn.tasks import load_checkpoint

    path = Path(str(overrides.get("model", "")))
    kinds = {"rtdetr": RTDETR, "-world": YOLOWorld, "yoloe": YOLOE}
    kind: Any = next((each for part, each in kinds.items() if part in path.stem.lower()), YOLO)
    if path.suffix == ".pt" and path.exists():
        model = load_checkpoint(path)[0]
        own = type(model).adapted_from if isinstance(model, Swapped) else type(model)
        kind = next((each for each in kinds.values() if _trains(each, own)), YOLO)
    tasks, task = kind.task_map.fget(None), overrides.get("task") or "detect"
    if task not in tasks:
        raise HostError(
            f"no trainer for task {task!r}: {kind.__name__} has {shortened(list(tasks))}; give trainer(spec, base=...)"
        )
    return tasks[task]["trainer"]


def _trains(kind: Any, model: type) -> bool:
    return any(each["model"] in model.__mro__ for each in kind.task_map.fget(None).values())
