"""transformers: a ``Trainer`` that trains, saves, resumes and loads adapters, and models saved as a base with adapters beside.

transformers is imported when ``trainer`` is called, and not with this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterFileError, HostError
from ..files.loading import load_adapter
from ..files.saving import save_adapter
from ..hosts.model import AdaptedModel
from ..hosts.modules import base_class
from ..hosts.slots import SLOT
from ..injection.auditing import audit
from ..injection.switching import disabled, set_active
from ..injection.training import auxiliary_loss, param_groups
from .restoring import restore_adapter

_PREFIX, _SUFFIX = "adapter_", ".safetensors"


def trainer(base: type | None = None) -> Any:
    """Return a subclass of ``transformers.Trainer`` (or of ``base``, one of its subclasses) that trains adapters.

    Inject into the model before the trainer is made. Then

    * the optimizer is the one that ``TrainingArguments`` name, with the groups of ``convpeft.param_groups``;
    * auxiliary losses of adapters are part of the loss;
    * ``save_model`` and each checkpoint write ``adapter_<name>.safetensors`` and the config, and no weights of the base;
    * ``resume_from_checkpoint`` and ``load_best_model_at_end`` give the adapter its values back, bit for bit.
    """
    if base is None:
        from transformers import Trainer

        base = Trainer
    return type(f"Adapter{base.__name__}", (AdapterTrainerMixin, base), {})


class AdapterTrainerMixin:
    """Mixin in front of a ``Trainer`` class: ``class Mine(AdapterTrainerMixin, Trainer)``; see ``trainer``."""

    args: Any
    model: Any
    optimizer: Any
    state: Any
    processing_class: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer that the arguments name, with the active adapters' groups.

        Raises:
            StateError: if nothing is injected; or, for an optimizer that was given, with all that ``audit`` finds wrong.
            HostError: for an optimizer that makes its groups itself.
        """
        if self.optimizer is None:
            kind, options = type(self).get_optimizer_cls_and_kwargs(self.args, self.model)  # type: ignore[attr-defined]
            own = {"params", "model", "optimizer_dict"} & options.keys()
            if own:
                raise HostError(
                    f"optim={self.args.optim!r} makes its own groups of parameters ({', '.join(own)}): choose another one"
                )
            groups = param_groups(
                self.model, lr=options.pop("lr", self.args.learning_rate), weight_decay=self.args.weight_decay
            )
            self.optimizer = kind(groups, **options)
        audit(self.model, self.optimizer).require_ok()
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the loss of ``Trainer`` with the auxiliary losses added."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        extra = auxiliary_loss(self.model)
        return (found[0] + extra, *found[1:]) if return_outputs else found + extra

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapters, the config and the arguments, and no weights of the base."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        _save_adapters(self.model, folder)
        for part in (getattr(self.model, "config", None), getattr(self, "processing_class", None)):
            if part is not None:
                part.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Give the adapter the values of a checkpoint, in place."""
        self._restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Give the adapter the values of the best checkpoint, in place."""
        self._restore(self.state.best_model_checkpoint)

    def _restore(self, folder: str) -> None:
        active = AdaptedModel.of(self.model).state.active
        for name in active if len(active) == 1 else ():
            path = Path(folder) / f"{_PREFIX}{name}{_SUFFIX}"
            if not path.exists():
                found = sorted(each.name for each in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"))
                raise AdapterFileError(f"{folder} has no adapter {name!r} (it has: {', '.join(found) or 'none'})")
            restore_adapter(self.model, path, name=name)
            return
        raise AdapterFileError(f"{folder}: one adapter can be restored at a time, and {len(active)} are active")


def save_pretrained(model: Any, folder: str | Path) -> None:
    """Write a model with adapters as its base, as ``model.save_pretrained`` does, and each adapter in a file beside.

    ``from_pretrained`` of the model's class opens the folder and gives the base; ``from_pretrained`` of this module gives the
    adapters as well.

    Raises:
        StateError: if nothing is injected.
    """
    adapted, folder = AdaptedModel.of(model), Path(folder)
    mark = f".{SLOT}."
    with disabled(adapted.root):
        base = {key: value for key, value in model.state_dict().items() if mark not in f".{key}"}
        model.save_pretrained(folder, state_dict=base)
    model.config.architectures = [base_class(model).__name__]
    model.config.save_pretrained(folder)
    _save_adapters(model, folder)


def from_pretrained(kind: Any, folder: str | Path, **options: Any) -> Any:
    """Return a model that ``save_pretrained`` of this module wrote, with all its adapters; none of them is active.

    Args:
        kind: the model's class, or one of transformers' ``AutoModel`` classes.
        folder: where it was written.
        options: for its own ``from_pretrained``.

    Raises:
        AdapterFileError: if the folder has no adapters, or one does not fit.
    """
    files = sorted(Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"))
    if not files:
        raise AdapterFileError(f"{folder} has no adapters ({_PREFIX}*{_SUFFIX}): use {kind.__name__}.from_pretrained")
    model: nn.Module = kind.from_pretrained(folder, **options)
    for path in files:
        load_adapter(model, path)
    set_active(model, None)
    return model


def _save_adapters(model: nn.Module, folder: Path) -> None:
    for name in AdaptedModel.of(model).state.adapters:
        save_adapter(model, folder / f"{_PREFIX}{name}{_SUFFIX}", name=name)
