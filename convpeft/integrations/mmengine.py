"""mmengine (mmdet, mmyolo, mmrotate ...): a model with an adapter, its optimizer, and checkpoints, for config files.

Importing this module registers them: ``custom_imports = dict(imports=["convpeft.integrations.mmengine"])``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner import load_checkpoint
from torch import nn

from ..errors import OptionError
from ..files.saving import save_adapter
from ..hosts.trials import deep_copy
from ..hosts.wrappers import inside
from ..injection.auditing import audit
from ..injection.inject import inject
from ..injection.training import auxiliary_loss, param_groups
from .restoring import KEY, adapter_of, restore_adapter

_AUXILIARY = "loss_convpeft"  # in the log


@MODELS.register_module(name="ConvPeft")
def adapted_model(
    detector: dict[str, Any], spec: Any, name: str = "default", base: str | None = None, sync_batchnorm: bool = False
) -> Any:
    """Return the detector of a config with an adapter in it: ``model=dict(type="ConvPeft", detector=..., spec=...)``.

    The adapter is injected when the model is built: then the optimizer, EMA, DDP and ``resume`` of a runner know it. Weights are
    initialised and loaded before that, and not again by the runner.

    Args:
        detector: config of the detector.
        spec: what ``convpeft.inject`` takes, a path included.
        name: of the adapter.
        base: checkpoint of the base; unset, the weights are those that the config initialises.
        sync_batchnorm: keep SyncBN layers, for several processes.
    """
    model: Any = MODELS.build(detector)
    if hasattr(model, "init_weights"):
        model.init_weights()
    if not sync_batchnorm:
        model = revert_sync_batchnorm(model)
    if base is not None:
        load_checkpoint(model, base, map_location="cpu", strict=True)
    inject(model, spec, name=name)
    for module in model.modules():
        if hasattr(module, "_is_init"):
            module.__dict__["_is_init"] = True  # a runner's init_weights() would overwrite the base
    model.register_forward_hook(_with_auxiliary_loss, with_kwargs=True)
    return model


def _with_auxiliary_loss(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Return a pass's losses with the auxiliary losses of adapters under a name of their own."""
    if not isinstance(output, dict) or not model.training or _AUXILIARY in output:
        return output
    extra = auxiliary_loss(model)
    return {**output, _AUXILIARY: extra} if extra.requires_grad else output


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ConvPeftOptimWrapperConstructor:
    """Builds the optimizer of a config with the groups of ``convpeft.param_groups``, and prints each with its ``lr_mult``.

    ``optim_wrapper=dict(constructor="ConvPeftOptimWrapperConstructor", optimizer=dict(type="AdamW", lr=5e-4), ...)``; other keys
    (``clip_grad``, ``accumulative_counts``, ``type="AmpOptimWrapper"``) mean what they always do.

    Raises:
        OptionError: for ``paramwise_cfg``, whose keys would match names of adapters; the spec's ``lr_mult`` says it.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        if paramwise_cfg:
            raise OptionError(
                f"paramwise_cfg={paramwise_cfg} would match parts of the names of adapters. Write lr_mult into the rules of the spec; "
                "norms, biases and scales have no weight decay anyway"
            )
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))

    def __call__(self, model: nn.Module) -> Any:
        """Return the optim wrapper.

        Raises:
            StateError: if the model has no adapter, or ``audit`` finds something wrong.
        """
        root = inside(model)
        lr, decay = self.optimizer["lr"], self.optimizer.get("weight_decay", 0.0)
        groups = param_groups(root, lr=lr, weight_decay=decay)
        for group in groups:
            count = sum(parameter.numel() for parameter in group["params"])
            text = f"convpeft: {group['name']}: lr_mult={group['lr_mult']:g} lr={group['lr']:g} weight_decay={group['weight_decay']:g}"
            print_log(f"{text} parameters={count:,}", logger="current")
        optimizer = OPTIMIZERS.build({**self.optimizer, "params": groups})
        audit(root, optimizer).require_ok()
        return OPTIM_WRAPPERS.build({"type": "OptimWrapper", **self.wrapper}, default_args={"optimizer": optimizer})


@HOOKS.register_module()
class ConvPeftHook(Hook):
    """Puts the adapter file into checkpoints, and gives the adapter its values back when one is resumed or loaded.

    It runs last, after EMA has put its average into the checkpoint. Without EMA the adapter stands in the place of the model's
    weights; with EMA the weights stay as well, for EMA to go on. ``adapter_of(path, file)`` of ``restoring`` takes the file out.

    Args:
        adapter_only: leave the model's weights out of checkpoints.
    """

    priority = "LOWEST"

    def __init__(self, adapter_only: bool = True) -> None:
        self.adapter_only = adapter_only

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the adapter file into a checkpoint."""
        saved = deep_copy(inside(runner.model))
        saved.load_state_dict(checkpoint["state_dict"])  # the average, if there is one
        with tempfile.TemporaryDirectory() as folder:
            checkpoint[KEY] = save_adapter(saved, Path(folder) / "adapter.safetensors").read_bytes()
        if self.adapter_only and "ema_state_dict" not in checkpoint:
            checkpoint["state_dict"] = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Give the adapter the values in a checkpoint, in place, with all checks of a file; other checkpoints load as ever."""
        if not isinstance(checkpoint.get(KEY), bytes):
            return
        model = inside(runner.model)
        if checkpoint["state_dict"] and "ema_state_dict" in checkpoint and runner._resume:
            return  # EMA has put both into place
        with tempfile.TemporaryDirectory() as folder:
            restore_adapter(model, adapter_of(checkpoint, Path(folder) / "adapter.safetensors"))
        checkpoint["state_dict"] = model.state_dict()  # nothing is missing, and nothing is said to be
