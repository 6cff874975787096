"""Adapters on ultralytics' YOLO-World: data, training, swap and merge in one demo.

Run ``python -m examples.yolo_world.demo --help`` from the repository's root.
"""

import os

# Read when torch is first imported. By default OpenMP's threads spin while they wait; beside any other busy program on
# few cores they then burn each other's time, and a step that takes 0.2 s was seen to take 16 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
