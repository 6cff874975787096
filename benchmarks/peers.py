"""Other libraries on the same layers, each at the setting that was fastest for it.

Measured on YOLO-World-v2-S: the base's BatchNorms in eval mode, no dropout; peft without its ``PeftModel`` wrapper;
LyCORIS in bypass mode, where it does not rebuild each layer's weight.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from .worlds import convs_of, hold_norms


class Attached(NamedTuple):
    """A model with a peer's adapters, and what of theirs is not inside it."""

    model: nn.Module
    beside: tuple[nn.Module, ...] = ()


def peft_config(method: str, names: Sequence[str], rank: int = 8) -> Any:
    """Return peft's configuration of ``lora``, ``dora`` or ``loha`` on layers by name, at scale 1."""
    import peft

    if method == "loha":
        return peft.LoHaConfig(r=rank, alpha=rank, target_modules=list(names))
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names), use_dora=method == "dora")


def attach_peft(model: nn.Module, method: str, parts: Sequence[str] = ("",), rank: int = 8) -> Attached:
    """Put peft's adapters into the model in place, without its wrapper; norms held."""
    import peft

    model = peft.inject_adapter_in_model(peft_config(method, convs_of(model, parts), rank), model)
    hold_norms(model)
    return Attached(model)


def wrap_peft(model: nn.Module, method: str, parts: Sequence[str] = ("",), rank: int = 8) -> Any:
    """Return the ``PeftModel`` around the model: what saves, loads, switches and merges in peft."""
    import peft

    return peft.get_peft_model(model, peft_config(method, convs_of(model, parts), rank))


def attach_lycoris(
    model: nn.Module, parts: Sequence[str] = ("",), rank: int = 8, *, bypass: bool = True, algorithm: str = "locon"
) -> Attached:
    """Put LyCORIS adapters into the model in place; they live beside it, outside its ``state_dict``."""
    with contextlib.redirect_stdout(io.StringIO()):
        from lycoris import LycorisNetwork

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    patterns = [f"{re.escape(name)}$" for name in convs_of(model, parts)]
    LycorisNetwork.apply_preset(
        {"enable_conv": True, "target_module": [], "target_name": patterns, "module_algo_map": {}, "name_algo_map": {}}
    )
    network = LycorisNetwork(
        model,
        lora_dim=rank,
        conv_lora_dim=rank,
        alpha=rank,
        conv_alpha=rank,
        network_module=algorithm,
        bypass_mode=bypass,
        warn_on_unmatched=False,
    )
    model.requires_grad_(False)
    network.apply_to()
    network.requires_grad_(True).train()
    hold_norms(model)
    return Attached(model, (network,))
