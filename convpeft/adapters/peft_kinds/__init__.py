"""The methods of the package peft as kinds ``peft:<method>``; peft is imported when such a kind is first used."""

from ..base import Adapter
from ..registry import Family, register_family
from .in_files import file_refusal


def register() -> None:
    """Register the family of kinds ``peft:<method>``."""
    register_family("peft:", Family(_look_up, file_refusal))


def _look_up(method: str) -> type[Adapter]:
    from .kinds import peft_adapter

    return peft_adapter(method)
