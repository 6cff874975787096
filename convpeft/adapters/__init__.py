"""The adapter kinds: importing this package registers the built-in ones."""

from .base import Adapter, AdapterOptions, Place, Site
from .bottleneck import Bottleneck
from .lora import Lora
from .rep_mona import RepMona

__all__ = ["Adapter", "AdapterOptions", "Bottleneck", "Lora", "Place", "RepMona", "Site"]
