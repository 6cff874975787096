"""A small detector-like net, an adapter file of it, and the file taken apart: what tests of adapter files share."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convpeft
from convpeft.adapters import Adapter
from convpeft.files.header import seal
from tests.cases import bits

SPEC = {
    "rules": [
        {"match": "stem", "kind": "rep_mona", "rank": 2, "kernel_sizes": [3, 5], "branch_norm": True, "lr_mult": 1.5},
        {"match": "body.0", "kind": "lora", "rank": 2, "alpha": 4.0},
        {"match": "body", "kind": "bottleneck", "reduction": 2},
        {"match": "proj", "kind": "lora", "rank": 1},
    ],
    "unfreeze": [{"match": "head", "lr_mult": 0.5}],
    "norm": "adapt",
}


class Small(nn.Module):
    """Convolutions, a linear layer, two norms and a head: all that a spec can address, in 700 numbers."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU())
        self.head = nn.Conv2d(6, 4, 1)
        self.proj = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.head(self.body(self.norm(self.stem(x)))).mean((2, 3)))


class Other(Small):
    """Another class with the same tensors."""


def base(dtype: torch.dtype = torch.float32, seed: int = 0, kind: type[Small] = Small) -> Small:
    """Return the same base for the same seed: random weights, non-trivial norm statistics, eval mode."""
    torch.manual_seed(seed)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.to(dtype).eval()


def adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def picture(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)


def trained(model: nn.Module, spec: Any = None, name: str = "screw", seed: int = 3) -> Any:
    """Inject, and give everything the adapter may change another value, statistics included; in place."""
    convpeft.inject(model, SPEC if spec is None else spec, name=name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in [m for adapter in adapters(model) for m in adapter.modules() if isinstance(m, nn.BatchNorm2d)]:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        for norm in (model.norm, model.body[1]) if (spec or SPEC).get("norm") == "adapt" else ():
            norm.running_mean.add_(0.25)
            norm.num_batches_tracked.add_(7)
    return model


def condition(model: nn.Module) -> tuple[Any, ...]:
    """Return all that a refused load must leave alone: classes, tensors, flags, modes, hooks, active adapters."""
    return (
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        convpeft.active_adapters(model),
        sorted(model.__dict__),
        {key: value.numpy(force=True).tobytes() for key, value in bits(model).items() if value.dtype != torch.bfloat16},
        torch.get_rng_state().numpy().tobytes(),
    )


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Return a file's safetensors header without metadata, convpeft's metadata, and the bytes of its tensors."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["convpeft"]), raw[8 + length :]


def put_together(path: Path, header: Any, metadata: Any, data: bytes, *, sealed: bool = True) -> Path:
    """Write a file from its parts; ``sealed`` recomputes the digest of the metadata, as a careful forger would."""
    if sealed and isinstance(metadata, dict) and "seal" in metadata:
        metadata = {**metadata, "seal": seal(metadata)}
    text = json.dumps({"__metadata__": {"convpeft": json.dumps(metadata)}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def assert_refused(path: Path, match: str, model=None, error=convpeft.AdapterFileError, **options):
    """Load into a model and check the refusal, and that the model is as it was in every respect."""
    model = base() if model is None else model
    before = condition(model)
    with pytest.raises(error, match=match) as caught:
        convpeft.load_adapter(model, path, **options)
    assert condition(model) == before
    return caught.value


def forged(original: Path, path: Path, change) -> Path:
    header, metadata, data = parts(original)
    change(metadata)
    return put_together(path, header, metadata, data)
