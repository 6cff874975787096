"""The detector, the one training loop and its parts, the frozen base, and the scores.

``commands`` and the programs at the top may import this folder; it imports ``data``, never ``commands``.
"""
