"""One question per script, all through one runner; ``python -m benchmarks`` runs them all and writes the pages.

They run under torch's own defaults. ``OMP_WAIT_POLICY=PASSIVE`` in the environment, good on a busy machine, would charge each
operation with waking threads that sleep.
"""
