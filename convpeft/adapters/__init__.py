"""The adapter kinds, one file each: what they compute, which layers they refuse, which convolutions they equal.

Nothing here knows of models; ``hosts`` and the folders above it import this one. Importing it registers every kind.
"""

from .base import Adapter, Host, Place, Site
from .bottleneck import Bottleneck
from .conv_lora import ConvLora
from .hierarchical import Hierarchical
from .lora import Lora
from .moe_rep_mona import MoeRepMona
from .mona import Mona
from .options import AdapterOptions
from .peft_kinds import register as _register_peft
from .rep_mona import RepMona

_register_peft()

__all__ = [
    "Adapter", "AdapterOptions", "Bottleneck", "ConvLora", "Hierarchical", "Host", "Lora", "MoeRepMona", "Mona",
    "Place", "RepMona", "Site",
]  # fmt: skip
