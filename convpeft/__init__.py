"""convpeft: parameter-efficient adapters for convolutional detectors. Exact, framework-agnostic, mergeable."""

from .adapters import Adapter, AdapterOptions, Site
from .checking import check
from .errors import (
    AdapterConflict,
    AdapterFileError,
    BaseMismatch,
    ConvPeftError,
    GeometryError,
    HostError,
    MergeError,
    NotMergeable,
    OptionError,
    PatternError,
    RegistrationError,
    ShapeMismatch,
    SpecError,
    StateError,
    UnknownAdapter,
    UnknownKind,
)
from .geometry import ConvGeometry
from .injection import active_adapters, disabled, eject, inject, plan, set_active, using
from .merging import MergePlan, merge, plan_merge
from .per_sample import route
from .planning import Plan
from .registry import adapter_kinds, register_adapter
from .spec import Rule, Spec, Unfreeze
from .storage import inspect_adapter, load_adapter, save_adapter
from .training import auxiliary_loss, param_groups, summary

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConflict",
    "AdapterFileError",
    "AdapterOptions",
    "BaseMismatch",
    "ConvGeometry",
    "ConvPeftError",
    "GeometryError",
    "HostError",
    "MergeError",
    "MergePlan",
    "NotMergeable",
    "OptionError",
    "PatternError",
    "Plan",
    "RegistrationError",
    "Rule",
    "ShapeMismatch",
    "Site",
    "Spec",
    "SpecError",
    "StateError",
    "Unfreeze",
    "UnknownAdapter",
    "UnknownKind",
    "active_adapters",
    "adapter_kinds",
    "auxiliary_loss",
    "check",
    "disabled",
    "eject",
    "inject",
    "inspect_adapter",
    "load_adapter",
    "merge",
    "param_groups",
    "plan",
    "plan_merge",
    "register_adapter",
    "route",
    "save_adapter",
    "set_active",
    "summary",
    "using",
]
