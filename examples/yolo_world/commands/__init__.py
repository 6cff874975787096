"""What is typed after ``python -m examples.yolo_world``, with the options and the output that the commands share.

Only the programs at the top may import this folder; it imports ``training`` and ``data``.
"""
