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
from .files.hub import from_pretrained, push_to_hub, save_pretrained
from .files.loading import load_adapter
from .files.lycoris_format import from_lycoris, to_lycoris
from .files.peft_format import from_peft, to_peft
from .files.saving import save_adapter
from .hosts.model import AdaptedModel
from .injection.auditing import audit
from .injection.calibration import calibrate
from .injection.checking import check
from .injection.extracting import extract
from .injection.extraction import ExtractedLayer, Extraction
from .injection.inject import eject, inject
from .injection.initialising import initialise
from .injection.progress import set_progress
from .injection.routing import route
from .injection.suggesting import suggest
from .injection.suggestion import Suggestion
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
    "AdaptedModel", "Adapter", "AdapterConflict", "AdapterFileError", "AdapterOptions", "BaseMismatch",
    "Combination", "ConvGeometry", "ConvPeftError", "ExtractedLayer", "Extraction", "FileMerge", "GeometryError",
    "HostError", "MergeError", "MergePlan", "NotMergeable", "OptionError", "PatternError", "Plan",
    "RegistrationError", "Rule", "ShapeMismatch", "Site", "Spec", "SpecError", "StateError", "Suggestion",
    "Unfreeze", "UnknownAdapter", "UnknownKind", "active_adapters", "adapter_kinds", "audit", "auxiliary_loss",
    "calibrate", "check", "combine", "disabled", "eject", "extract", "from_lycoris", "from_peft", "from_pretrained",
    "initialise", "inject", "inspect_adapter", "load_adapter", "merge", "merge_files", "param_groups", "plan",
    "plan_merge", "push_to_hub", "register_adapter", "route", "save_adapter", "save_pretrained", "set_active",
    "set_progress", "suggest", "summary", "to_lycoris", "to_peft", "using",
]  # fmt: skip
