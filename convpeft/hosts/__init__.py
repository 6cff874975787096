"""What adapters sit on: the user's modules, the swap of their class, the sum of parts, and the records of a model.

Here alone is written into the child that convpeft gives a module (``slots``). Imports ``adapters`` and below.
"""
