"""The methods of the package peft as kinds ``peft:<method>``; peft is imported when the first of them is asked for."""

from ..base import Adapter
from ..registry import register_family


def register() -> None:
    """Register the family ``peft:``."""
    register_family("peft:", _look_up)


def _look_up(method: str) -> type[Adapter]:
    from .kinds import peft_adapter

    return peft_adapter(method)
