"""The configuration in a peft folder, ``adapter_config.json``: read as plain data, resolved for each layer, and written.

Format: the package peft (0.21), https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.peft_kinds.in_files import METHODS
from ..errors import AdapterFileError, brief, shown
from ..planning.parsing import strict_json
from .reading import kind_of_file

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
ALL_LINEAR = "all-linear"
_MOST_BYTES = 2**20  # of a configuration
_MOST_LETTERS = 100_000  # of a pattern
_MOST_STEPS = 1e7  # that matching one may take, as estimated
_LONG = 50  # letters of a module's name
_READ = {  # what is read, or changes no number of an adapter that was trained already
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out", "feedforward_modules", "ensure_weight_tying",
}  # fmt: skip
_LORA = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"}
_IDLE = {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}}  # say nothing by themselves
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # starts of LoRA that leave the base as it is


@dataclass(frozen=True)
class PeftConfig:
    """What a peft folder says of its adapter.

    Attributes:
        path: of the file.
        method: of peft, in lower case.
        values: everything, as plain data.
    """

    path: Path
    method: str
    values: Mapping[str, Any]

    @property
    def alpha_field(self) -> str:
        """The name of the method's alpha."""
        return "lora_alpha" if self.method == "lora" else "alpha"

    def of_layer(self, field: str, pattern: str, layer: str) -> Any:
        """Return a number for one layer: that of the first pattern that matches its name, else the general one.

        Args:
            field: ``r`` or ``alpha_field``.
            pattern: ``rank_pattern`` or ``alpha_pattern``.
            layer: its name.
        """
        for text, value in (self.values.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({text})$", layer):  # as peft does
                return value
        return self.values.get(field)

    def targets(self, layer: str) -> bool | None:
        """Return whether the adapter is meant for a layer of this name; None where the configuration does not tell."""
        wanted = self.values.get("target_modules")
        if wanted is None or wanted == ALL_LINEAR or self.values.get("layers_to_transform") is not None:
            return None
        if _selects(self.values.get("exclude_modules") or [], layer):
            return False
        return _selects(wanted, layer)


def _selects(wanted: str | list[str], layer: str) -> bool:
    """Return whether a pattern, or a list of names and ends of names, means a layer."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, layer) is not None
    return any(layer == each or layer.endswith(f".{each}") for each in wanted)


def read_config(folder: Path) -> PeftConfig:
    """Return the configuration of a peft folder.

    Raises:
        AdapterFileError: if it is missing or not sound, its method may not be named by a file, or it says what
            convpeft has no counterpart of.
    """
    path = folder / CONFIG
    data = _plain_data(path)
    method = data.get("peft_type")
    method = method.lower() if isinstance(method, str) else method
    if method not in METHODS:
        raise AdapterFileError(f"{path}: peft_type {shown(data.get('peft_type'))} is none of {', '.join(METHODS)}")
    problems = [*_type_problems(data), *(_lora_problems(data) if method == "lora" else ())]
    if problems:
        raise AdapterFileError(f"{path}: {'; '.join(problems)}")
    return PeftConfig(path, method, data)


def _plain_data(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            kind = kind_of_file(path.stat().st_mode)
            raise AdapterFileError(f"{path} cannot be read: it is {kind}")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MOST_BYTES:
                raise AdapterFileError(f"{path} is larger than {_MOST_BYTES:,} bytes: no configuration is")
            data = strict_json(file.read(_MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}. A peft folder has {CONFIG} and {TENSORS}.") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is damaged: it is not JSON ({brief(str(error))})") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{path} is no configuration of peft: it is a {type(data).__name__}")
    return data


def _type_problems(data: Mapping[str, Any]) -> Iterable[str]:
    """Yield what is of the wrong type among the parts that name layers, and patterns that could take too long."""
    for key in ("rank_pattern", "alpha_pattern"):
        table = data.get(key) or {}
        if not isinstance(table, dict) or not all(_is_number(value) for value in table.values()):
            yield f"{key} is {shown(table)}, no numbers by pattern"
        else:
            yield from (f"{key}: {problem}" for text in table if (problem := _pattern_problem(text)))
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = data.get(key)
        if isinstance(value, str) and key != "modules_to_save":
            problem = _pattern_problem(value)
            if problem:
                yield f"{key}: {problem}"
        elif value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            yield f"{key} is {shown(value)}, no list of names"


def _lora_problems(data: Mapping[str, Any]) -> Iterable[str]:
    """Yield what a LoRA configuration says that the kind ``lora`` does not compute."""
    for key in sorted(set(data) - _READ - _LORA):
        if data[key] and data[key] != _IDLE.get(key):
            yield f"{shown(key)} is {shown(data[key])}, which has no counterpart here"
    start = data.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        yield (
            f"init_lora_weights is {shown(start)}, which changes the base's weights when it starts: convert the adapter to "
            "plain LoRA with peft first (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    if not _is_number(data.get("r", 8)) or not _is_number(data.get("lora_alpha", 8)):
        yield f"r is {shown(data.get('r'))} and lora_alpha {shown(data.get('lora_alpha'))}, no numbers"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**31


def _pattern_problem(text: str) -> str | None:
    """Return why a pattern of a file is not matched with names, or None when it is: it could take too long, or is none."""
    if len(text) > _MOST_LETTERS or _most_steps(text) > _MOST_STEPS:
        return f"{shown(text)} is a pattern that could take too long to match; name the layers instead"
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        return f"{shown(text)} is no regular expression ({brief(str(error))})"
    return None


def _most_steps(text: str) -> float:
    """Return about how many ways a regular expression can go wrong on a name: repetitions, options and choices multiply.

    A repeated group may go wrong in exponentially many; it is not allowed, nor are groups that look ahead or back.

    Example:
        >>> _most_steps("model[.](1|2)[.].*"), _most_steps("(a+)+")
        (100.0, inf)
    """
    bare = re.sub(
        r"\[[^\[\]]*\]", "a", re.sub(r"\\[^0-9]", "a", text)
    )  # escaped characters and sets are one like others
    if re.search(r"\)[*+{]|\(\?(?!:)|\\", bare):
        return math.inf
    bare = bare.replace("(?:", "(")
    depth = choices = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        choices += character == "|" and depth > 0
    groups, repeats, options = bare.count("("), len(re.findall(r"[*+]|\{\d*,\d*\}", bare)), bare.count("?")
    exponent = repeats * math.log(_LONG) + options * math.log(2) + groups * math.log(1 + choices / max(1, groups))
    return round(math.exp(min(exponent, 100.0)), 3)


def exactly(name: str) -> str:
    """Return the key of ``rank_pattern`` or ``alpha_pattern`` that matches this very name and no other."""
    return f"^{re.escape(name)}"


def any_of(names: Iterable[str]) -> str:
    """Return the ``target_modules`` that match these very names and no others."""
    return "|".join(map(re.escape, names))


def config_text(values: Mapping[str, Any]) -> bytes:
    """Return a configuration as the bytes of its file."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
