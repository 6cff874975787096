"""Adapters on ultralytics' YOLO-World: a quickstart to read, a demo to run, and commands for one's own data.

Run ``python -m examples.yolo_world`` from the repository's root for the list; ``README.md`` beside this file explains it.
"""

import os

# Read when torch is first imported. By default OpenMP's threads spin while they wait; beside any other busy program on
# few cores they then burn each other's time, and a step that takes 0.2 s was seen to take 16 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
