"""Read YAML and JSON, strict about keys said twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import SpecError

_MERGE = "tag:yaml.org,2002:merge"


def read_data(path: str | Path) -> Any:
    """Return the plain data of a file: JSON for a path ending in ``.json``, else YAML.

    Raises:
        SpecError: if it cannot be read, or says a key twice in one mapping (both formats would keep the last).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise SpecError(f"{path} cannot be read as a spec: {error}") from error


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs as a dict, or raise a ValueError for a key said twice."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is said twice in one mapping")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with ``_once``."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once((self.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE)
        return super().construct_mapping(node, deep)
