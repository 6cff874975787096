"""The adapter kinds: importing this package registers the built-in ones."""

from ..adding import Host
from .base import Adapter, AdapterOptions, Place, Site
from .bottleneck import Bottleneck
from .conv_lora import ConvLora
from .hierarchical import Hierarchical
from .lora import Lora
from .moe_rep_mona import MoeRepMona
from .mona import Mona
from .rep_mona import RepMona

__all__ = [
    "Adapter",
    "AdapterOptions",
    "Bottleneck",
    "ConvLora",
    "Hierarchical",
    "Host",
    "Lora",
    "MoeRepMona",
    "Mona",
    "Place",
    "RepMona",
    "Site",
]
