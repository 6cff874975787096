"""What a user asks for, and what it would come to on a model: specs, patterns, rules, sites and plans. Touches nothing.

Everything that can be refused is refused here. Imports ``hosts`` and below.
"""
