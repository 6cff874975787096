"""The families the contract runs on, one file for each codebase; importing one registers its families."""

from . import effdet, libreyolo, segmentation, timm, torchvision, transformers, ultralytics  # noqa: F401
from .subjects import FAMILIES, Family, Subject

__all__ = ["FAMILIES", "Family", "Subject"]
