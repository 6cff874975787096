"""peft and LyCORIS as libraries for the steps, each at its best setting.

A library may leave layers out that it cannot adapt, so that one of them does not decide every step; only where every
layer is the question (``all_layers``) it must take them all.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from torch import nn

from .steps import RANK, layers_of
from .zoo import Subject


def adaptable(model: nn.Module, subject: Subject) -> dict[str, Any]:
    """Return the layers that a rule of convpeft's reaches, by name."""
    return {name: model.get_submodule(name) for name in sorted(layers_of(model)) if subject.adapts(name)}


class PeftLora:
    """peft's LoRA. Left out: layers whose groups do not divide the rank (it refuses), dilated ones (they crash)."""

    def __init__(self, all_layers: bool = False) -> None:
        self.all_layers = all_layers

    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        """Return the model with peft's layers in it; the wrapper that peft needs later rides along."""
        from peft import LoraConfig, get_peft_model

        layers = adaptable(model, subject)
        names = [name for name, layer in layers.items() if self.all_layers or self._accepts(layer)]
        self._answer(model)
        return self._base(get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)))

    def _accepts(self, layer: Any) -> bool:
        return isinstance(layer, nn.Linear) or (RANK % layer.groups == 0 and layer.dilation == (1, 1))

    def _answer(self, model: nn.Module) -> None:
        """Make a model of transformers that has no word embeddings say so, in place: peft asks, and would raise."""
        if not self.all_layers and hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings = nn.Identity

    def _base(self, wrapped: Any) -> nn.Module:
        base = wrapped.get_base_model()
        base.__dict__["_peft_wrapped"] = wrapped
        return base

    def adapters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return both factors of every LoRA, by layer."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        return {name: [p for key, p in layer.named_parameters() if "lora_" in key] for name, layer in layers}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write peft's own folder beside ``path``."""
        model.__dict__["_peft_wrapped"].save_pretrained(path.parent / "peft")

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the model with the adapters of that folder."""
        from peft import PeftModel

        self._answer(model)
        return self._base(PeftModel.from_pretrained(model, path.parent / "peft"))

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the base with the adapters merged."""
        return model.__dict__["_peft_wrapped"].merge_and_unload()

    def eject(self, model: nn.Module) -> nn.Module:
        """Return the base without adapters."""
        return model.__dict__["_peft_wrapped"].unload()


class LycorisLora:
    """LyCORIS's LoCon, freezing done by hand. Left out: convolutions with a forward of their own (they crash)."""

    def __init__(self, all_layers: bool = False) -> None:
        self.all_layers = all_layers

    def attach(self, model: nn.Module, subject: Subject) -> nn.Module:
        """Return the model with its layers' forwards replaced; the network of adapters rides along."""
        from lycoris import LycorisNetwork, create_lycoris

        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        layers = adaptable(model, subject)
        names = [name for name, layer in layers.items() if self.all_layers or self._accepts(layer)]
        LycorisNetwork.apply_preset({"target_module": [], "target_name": [f"{re.escape(name)}$" for name in names]})
        network = create_lycoris(model.requires_grad_(False), 1.0, linear_dim=RANK, linear_alpha=RANK, algo="locon")
        return self._carry(model, network)

    def _accepts(self, layer: Any) -> bool:
        return isinstance(layer, nn.Linear) or type(layer).forward is nn.Conv2d.forward

    def _carry(self, model: nn.Module, network: Any) -> nn.Module:
        network.apply_to()
        network.to(next(model.parameters()).dtype)
        model.__dict__["_lycoris_network"] = network
        return model

    def adapters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Return the factors of every LoCon, by layer."""
        names = {id(module): name for name, module in model.named_modules()}
        network = model.__dict__["_lycoris_network"]
        return {names[id(lora.org_module[0])]: list(lora.parameters()) for lora in network.loras}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write the network's file."""
        model.__dict__["_lycoris_network"].save_weights(str(path), None, None)

    def load(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the model with the network of that file."""
        from lycoris import create_lycoris_from_weights

        network, _ = create_lycoris_from_weights(1.0, str(path), model.requires_grad_(False))
        return self._carry(model, network)

    def merge(self, model: nn.Module) -> nn.Module:
        """Return the model with the adapters merged and the forwards put back."""
        network = model.__dict__.pop("_lycoris_network")
        network.restore()
        network.merge_to(1.0, precise=True)
        return model

    def eject(self, model: nn.Module) -> nn.Module:
        """Return the model with the forwards put back."""
        model.__dict__.pop("_lycoris_network").restore()
        return model
