"""One file for each framework that convpeft is at home in; the framework is imported when first needed.

Stands on top: nothing else in the package imports it.
"""
