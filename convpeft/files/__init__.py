"""Adapter files: one safetensors file of tensors and one JSON text, written in one step and read all or nothing.

Imports ``merging`` and below; only ``integrations`` stands above.
"""
