"""Carries out a plan: build, install or roll back; then switch, route, train and check the adapters that are in a model.

Imports ``planning`` and below.
"""
