"""The methods of the package peft as kinds ``peft:<method>``; peft is imported when such a kind is first used."""

from ..base import Adapter
from ..registry import register_family


def register() -> None:
    """Register the family of kinds ``peft:<method>``."""
    register_family("peft:", _look_up)


def _look_up(method: str) -> type[Adapter]:
    from .kinds import peft_adapter

    return peft_adapter(method)
