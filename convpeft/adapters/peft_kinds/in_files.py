"""What of peft a file may name: methods that compute a weight from numbers, and numbers, switches and known words.

A spec is its user's own and may name every method. A file comes from anywhere. Some methods load a model from a path or
an address in their options, or compile code; those are not in the list, and peft is not imported to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import shown

METHODS = (
    "boft", "fourierft", "gralora", "hira", "hra", "ia3", "loha", "lokr", "lora", "oft", "peanut", "randlora", "shira",
    "vera", "waveft",
)  # fmt: skip

_WORDS = {  # the texts that an option may have
    "act_fn": (
        "elu", "gelu", "gelu_new", "leaky_relu", "linear", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "swish",
        "tanh",
    ),
    "init_lora_weights": ("eva", "gaussian"),
    "init_weights": ("gaussian", "kaiming_uniform", "lycoris", "xavier_uniform"),
    "mask_type": ("random",),
    "megatron_core": ("megatron.core",),  # its default; convpeft never sets what would import it
    "wavelet_family": (
        *(f"coif{order}" for order in range(1, 18)), *(f"db{order}" for order in range(1, 39)),
        *(f"sym{order}" for order in range(2, 21)),
    ),
}  # fmt: skip
_FREE = ("alpha", "lora_alpha", "projection_prng_key", "random_loc_seed", "random_seed", "randlora_alpha")
_REPEATS = ("boft_n_butterfly_factor", "depth", "num_cayley_neumann_terms")
_MOST_REPEATS = 64
_ALWAYS = 1024  # a size that any file may give: it need not be seen in a tensor


def file_refusal(method: str, options: Mapping[str, Any], size: int) -> str | None:
    """Return why a file may not name a method of peft with these options, or None when it may; see ``Family``."""
    if method not in METHODS:
        return f"a file may not name kind {shown('peft:' + method)}, only the methods {', '.join(METHODS)} of peft"
    for name, value in options.items():
        if isinstance(value, str):
            allowed = value in _WORDS.get(name, ())
        elif isinstance(value, int) and not isinstance(value, bool):
            most = 2**63 if name in _FREE else _MOST_REPEATS if name in _REPEATS else max(size, _ALWAYS)
            allowed = -(2**63) <= value <= most
        else:
            allowed = value is None or isinstance(value, (bool, float))
        if not allowed:
            return f"a file may not set {name} of kind 'peft:{method}' to {shown(value)}"
    return None
