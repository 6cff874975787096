"""convpeft: parameter-efficient adapters for convolutional detectors. Exact, framework-agnostic, mergeable."""

from .adapters import Adapter, AdapterOptions, Site
from .adapters.registry import adapter_kinds, register_adapter
from .convolution.geometry import ConvGeometry
from .errors import (
    AdapterConflict, AdapterFileError, BaseMismatch, ConvPeftError, GeometryError, HostError, MergeError, NotMergeable,
    OptionError, PatternError, RegistrationError, ShapeMismatch, SpecError, StateError, UnknownAdapter, UnknownKind,
)  # fmt: skip
from .files.combining import Combination, combine
from .files.file_merge import FileMerge, merge_files
from .files.header import inspect_adapter
from .files.loading import load_adapter
from .files.saving import save_adapter
from .hosts.model import AdaptedModel
from .injection.checking import check
from .injection.inject import eject, inject
from .injection.routing import route
from .injection.switching import active_adapters, disabled, set_active, using
from .injection.training import auxiliary_loss, param_groups, summary
from .merging.merge import merge, plan_merge
from .merging.plan import MergePlan
from .planning.plan import Plan
from .planning.planner import plan
from .planning.rules import Rule, Unfreeze
from .planning.spec import Spec

__version__ = "0.1.0"

__all__ = [
    "AdaptedModel", "Adapter", "AdapterConflict", "AdapterFileError", "AdapterOptions", "BaseMismatch", "Combination", "ConvGeometry",
    "ConvPeftError", "FileMerge", "GeometryError", "HostError", "MergeError", "MergePlan", "NotMergeable", "OptionError", "PatternError",
    "Plan", "RegistrationError", "Rule", "ShapeMismatch", "Site", "Spec", "SpecError", "StateError", "Unfreeze",
    "UnknownAdapter", "UnknownKind", "active_adapters", "adapter_kinds", "auxiliary_loss", "check", "combine", "disabled", "eject",
    "inject", "inspect_adapter", "load_adapter", "merge", "merge_files", "param_groups", "plan", "plan_merge", "register_adapter", "route",
    "save_adapter", "set_active", "summary", "using",
]  # fmt: skip
