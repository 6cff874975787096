"""ultralytics: train adapters with ``YOLO.train``, run adapted models where ultralytics fuses, and fuse merged ones.

ultralytics is licensed AGPL-3.0 and not imported with this module: only ``trainer`` does, when a training begins, and
``from_config``, when it is called. Blocks to fuse are known by their parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HostError, OptionError
from ..files.header import AdapterFile
from ..files.loading import load_adapter as load_into
from ..hosts.chains import carries_chains, chains_of
from ..hosts.guards import has_adapters
from ..hosts.modules import base_class
from ..hosts.slots import slots_of
from ..hosts.transactions import protect, unwatch
from ..injection.switching import set_active as activate
from ..merging.merge import merge
from ..planning.spec import SpecLike, as_spec
from .folding import fold, may_fold
from .ultralytics_training import AdapterTrainer, base_trainer


def trainer(spec: SpecLike, *, name: str = "default", base: Any = None, form: str = "auto") -> Callable[..., Any]:
    """Return what ``YOLO.train(trainer=...)`` takes to train an adapter instead of the model.

    The adapter is injected when ultralytics builds the model; the base stays frozen whatever ``freeze=`` says, and norms are
    the spec's matter. The optimizer, its warm-up and its decay are ultralytics', with the adapter's parameters only, each
    group at ``lr_mult`` times its rate. In the run's folder ``weights`` are then, beside the usual files:

    * ``best.safetensors`` and ``last.safetensors``: the adapter, from the average (EMA), in the model's own precision;
    * ``base.pt``: the base that these files belong to, for ``YOLO(...)`` and ``load_adapter``;
    * ``best.pt`` and ``last.pt``: when the run is over, the merged model, which ultralytics validates, exports and predicts
      with like any of its own. Before that they hold the adapted model, and ``resume=True`` goes on with its adapter.

    Args:
        spec: what ``convpeft.inject`` takes.
        name: of the adapter.
        base: a trainer class of ultralytics; a ``YOLO`` (``RTDETR`` ...), whose task decides; unset, the task and the model of
            the training decide.
        form: of the merge, see ``convpeft.plan_merge``. ``"single"`` leaves plain convolutions; ``"auto"`` may leave chains,
            and then ``best.pt`` is fused and needs convpeft to load. Layers that cannot merge stay adapted, and unfused.

    Raises:
        SpecError: if the spec is not sound; when the training begins, if it does not fit the model.
    """
    wanted = as_spec(spec)

    def class_for(overrides: dict[str, Any]) -> type:
        own = base_trainer(base, overrides)
        body = {"spec": wanted, "adapter_name": name, "form": form, "deployed": staticmethod(deployed)}
        return type(f"Adapter{own.__name__}", (AdapterTrainer, own), body)

    if base is not None:
        return class_for({})

    def make(*args: Any, overrides: Any = None, **kwargs: Any) -> Any:
        return class_for(overrides or {})(*args, overrides=overrides, **kwargs)

    return make


def load_adapter(yolo: Any, path: str | Path, *, name: str | None = None, any_base: bool = False) -> AdapterFile:
    """Load an adapter file into a ``YOLO`` (or its module) in place, make it active, and return what the file says.

    ``val``, ``predict``, ``track``, ``export`` and ``benchmark`` of ultralytics work from then on, see ``serve``.

    Raises:
        AdapterFileError, BaseMismatch, StateError: as ``convpeft.load_adapter`` does.
    """
    found = load_into(_module(yolo), path, name=name, any_base=any_base)
    serve(yolo)
    return found


def set_active(yolo: Any, names: str | Iterable[str] | None) -> None:
    """Switch the adapters of a ``YOLO`` (or its module), in place; what it predicts next is made with them.

    Raises:
        UnknownAdapter, AdapterConflict, StateError: as ``convpeft.set_active`` does.
    """
    activate(_module(yolo), names)
    serve(yolo)


def serve(yolo: Any) -> Any:
    """Let ultralytics run an adapted ``YOLO`` (or its module) where it wants to fuse, in place, and return it.

    ``fuse()`` of the module returns a fused copy of the merged model from now on, and leaves the adapted one as it is. Layers
    that cannot merge stay adapted in it, and then it is not fused. Call it again after adapters were switched
    (``set_active`` here does): a predictor that ultralytics keeps has the copy from before.
    """
    module = _module(yolo)
    module.__dict__["fuse"] = Served(module)
    if yolo is not module:
        yolo.predictor = None
    return yolo


class Served:
    """Stands in for ``fuse`` of an adapted module: returns a copy to run, merged and fused where that is possible."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the copy; ultralytics' own arguments are about what it prints."""
        with torch.inference_mode(False):
            if not any(map(has_adapters, self.module.modules())):
                return self.module
            found = deployed(self.module, "auto")
            return found if any(map(has_adapters, found.modules())) else fuse(found)


def deployed(model: nn.Module, form: str = "auto") -> nn.Module:
    """Return a copy of an adapted model without adapters, to run with ultralytics alone.

    If it has chains, it is fused. Layers that cannot merge stay adapted, and ``fuse()`` returns the copy as it is.

    Args:
        model: an ultralytics module, with active adapters or none.
        form: of the merge.
    """
    plain = copy.deepcopy(model)
    plain.__dict__.pop("fuse", None)
    if not any(map(has_adapters, plain.modules())):
        return plain
    plain = merge(plain, form=form, inplace=True, strict=False)
    if any(map(has_adapters, plain.modules())):
        plain.__dict__["fuse"] = Unfused(plain)
        return plain
    return fuse(plain) if any(map(carries_chains, plain.modules())) else plain


class Unfused:
    """Stands in for ``fuse`` of a module that keeps adapters: returns the module, unfused."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the module."""
        return self.module


def _module(yolo: Any) -> nn.Module:
    """Return the module of a ``YOLO``; a module is returned itself."""
    held = yolo._modules.get("model") if isinstance(yolo, nn.Module) else None
    return held if held is not None and hasattr(type(yolo), "task_map") else yolo


def from_config(config: str, **arguments: Any) -> nn.Module:
    """Return a model of ultralytics built from one of its configurations, without weights; this imports ultralytics.

    Args:
        config: ``yolov8n.yaml`` or another; a file of weights is refused, since ultralytics would unpickle or download it.
        arguments: of ultralytics' ``YOLO``.

    Raises:
        OptionError: if it is no configuration.
    """
    if not config.endswith((".yaml", ".yml")):
        raise OptionError(
            f"{config!r} is no configuration of ultralytics: give one that ends in .yaml, such as yolov8n.yaml"
        )
    from ultralytics import YOLO

    model: Any = YOLO(config, **arguments).model
    return model  # type: ignore[no-any-return]


def fuse(model: nn.Module) -> nn.Module:
    """Fuse the norms of a merged ultralytics model into its convolutions, in place, and return it.

    ``model.fuse()`` folds each block's BatchNorm into the block's convolution. Where ``convpeft.merge`` left a chain
    beside that convolution, the norm scales the chain too, so it goes into both here: every chain's last step is scaled
    by the norm's gain, the first chain takes the norm's shift. The rest is ultralytics' own. A copy is fused first; if
    anything there touches a layer that carries a chain in another way, the model is refused.

    Args:
        model: as ``convpeft.merge`` returned it, in any form (or one that convpeft never saw).

    Raises:
        HostError: if the model is still adapted, has no ``fuse``, or fusing it would pass a chain by; the text names the
            layers, and the model is unchanged.
    """
    if any(slots_of(module) is not None for module in model.modules()):
        raise HostError(
            f"this {base_class(model).__name__} still carries adapters, which fusing would lose. Call "
            "convpeft.merge(model) first and fuse what it returns; the model is unchanged."
        )
    if not callable(getattr(type(model), "fuse", None)):
        raise HostError(
            f"{type(model).__name__} has no fuse(): this is for ultralytics' models; the model is unchanged."
        )
    try:
        lost = _fuse(copy.deepcopy(model))
    except Exception as error:  # ultralytics' own code on a layer it does not expect
        raise HostError(_refusal(model, f"its own fuse() fails ({type(error).__name__}: {error})")) from error
    if lost:
        raise HostError(_refusal(model, f"fusing would pass by the chains of a factored merge at {', '.join(lost)}"))
    _fuse(model)
    return model


def _fuse(model: Any) -> list[str]:
    """Fuse in place, and return the names of layers with chains that were rewritten or replaced by ultralytics."""
    unwatch(model)
    for block in list(model.modules()):
        if _folds_beside(block):
            _fold(block)
    before = {name: _tensors(module) for name, module in model.named_modules() if carries_chains(module)}
    model.fuse(verbose=False)
    protect(model)
    modules = dict(model.named_modules())
    return [name for name, tensors in before.items() if not _is_kept(modules.get(name), tensors)]


def _folds_beside(block: Any) -> bool:
    """Return whether a block is ultralytics' convolution, norm, activation, with chains beside its convolution only."""
    conv, norm = block._modules.get("conv"), block._modules.get("bn")
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    plain = callable(getattr(block, "forward_fuse", None)) and not hasattr(block, "fuse_convs")
    return plain and carries_chains(conv) and conv.bias is None and may_fold(conv, norm)


def _fold(block: Any) -> None:
    """Fold a block's norm into its convolution and the chains beside it, in place, as the block's own fusing leaves it."""
    fold(block.conv, block.bn)
    block.conv.requires_grad_(False)
    del block.bn
    block.forward = block.forward_fuse


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a layer's own tensors and of its chains."""
    chains = [chains.held for chains in chains_of(module)]
    held = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for number, chain in enumerate(chains):
        held.update({f"{number}.{key}": tensor for key, tensor in chain.state_dict().items()})
    return {key: tensor.detach().clone() for key, tensor in held.items()}


def _is_kept(module: nn.Module | None, tensors: dict[str, Tensor]) -> bool:
    if module is None or not carries_chains(module):
        return False
    now = _tensors(module)
    return now.keys() == tensors.keys() and all(torch.equal(now[key], tensors[key]) for key in tensors)


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"this {type(model).__name__} cannot be fused: {why}. Merge with convpeft.merge(model, form='single'), put the "
        "adapters beside those layers instead of on their outputs, or do not fuse; the model is unchanged."
    )
