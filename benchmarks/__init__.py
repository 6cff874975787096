"""One question per script, all through one runner; ``python -m benchmarks`` runs all and writes docs/benchmarks.md."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: idle threads must not spin
