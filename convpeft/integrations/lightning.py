"""Lightning: a callback that injects before the optimizer is built, audits, and keeps the adapter alone in checkpoints.

Lightning is imported when ``callback`` is called, and not with this module.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..files.saving import save_adapter
from ..hosts.model import AdaptedModel
from ..injection.auditing import audit
from ..injection.inject import inject
from ..planning.spec import SpecLike, as_spec
from .restoring import KEY, adapter_of, restore_adapter

__all__ = ["AdapterCallbackMixin", "adapter_of", "callback"]


def callback(spec: SpecLike, *, name: str = "default", module: str = "") -> Any:
    """Return a ``lightning.pytorch.Callback`` that trains an adapter.

    * In ``setup``, which is before Lightning asks for the optimizer, it injects, unless the adapter is there already.
      ``configure_optimizers`` then gives ``convpeft.param_groups(self.<module>, lr=...)``.
    * At the start of a fit it raises what ``convpeft.audit`` finds wrong: an optimizer without the adapter, rates that ignore
      ``lr_mult``.
    * Checkpoints have the adapter file instead of the model's weights (``adapter_of`` takes it out), beside Lightning's
      optimizers, loops and callbacks. ``fit(ckpt_path=...)`` and ``test(ckpt_path="best")`` give the adapter its values
      back; the base's own weights are where they came from.

    Args:
        spec: what ``convpeft.inject`` takes; its names are below ``module``.
        name: of the adapter.
        module: name of the attribute of the ``LightningModule`` that is to have the adapter, so that its files fit that model
            elsewhere; unset, the whole.
    """
    from lightning.pytorch import Callback

    return type("AdapterCallback", (AdapterCallbackMixin, Callback), {})(as_spec(spec), name, module)


class AdapterCallbackMixin:
    """The hooks of the callback; see ``callback``."""

    def __init__(self, spec: Any, name: str, module: str) -> None:
        super().__init__()
        self.spec, self.name, self.module = spec, name, module

    def _part(self, owner: Any) -> nn.Module:
        return owner.get_submodule(self.module) if self.module else owner

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Inject, if the adapter is not there yet."""
        part = self._part(pl_module)
        adapted = AdaptedModel.find(part)
        if adapted is None or self.name not in adapted.state.adapters:
            inject(part, self.spec, name=self.name)
        pl_module.strict_loading = (
            False  # a checkpoint has no weights of the base: on_load_checkpoint loads, and checks
        )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise what is wrong with the optimizers."""
        if trainer.optimizers:
            audit(self._part(pl_module), list(trainer.optimizers)).require_ok()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise what is wrong with the optimizers, for strategies that build them late."""
        audit(self._part(pl_module), list(trainer.optimizers)).require_ok()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the adapter file into a checkpoint, in the place of the weights of the part that has it."""
        part = self._part(pl_module)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint[KEY] = save_adapter(part, Path(folder) / "adapter.safetensors", name=self.name).read_bytes()
        prefix = f"{self.module}." if self.module else ""
        checkpoint["state_dict"] = {
            key: value for key, value in checkpoint["state_dict"].items() if not key.startswith(prefix)
        }

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Give the adapter the values in a checkpoint, in place."""
        with tempfile.TemporaryDirectory() as folder:
            restore_adapter(
                self._part(pl_module), adapter_of(checkpoint, Path(folder) / "adapter.safetensors"), name=self.name
            )
