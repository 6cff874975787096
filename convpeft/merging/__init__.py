"""Folds adapters into plain layers, exactly or not at all: forms, the probe of each layer, the check of the whole model.

Imports ``planning`` and below.
"""
