"""One file for each framework with support of its own; the framework is imported when first needed.

Stands on top: nothing else in the package imports it.
"""
