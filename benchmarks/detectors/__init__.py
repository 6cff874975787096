"""Real detectors and the steps of the contract: what the tests run on them, and what docs/detectors.md says of peers.

``zoo`` holds the detectors, ``steps`` what each library is put through, ``peers`` how peft and LyCORIS are used,
``judging`` runs all three together, and ``page`` writes docs/detectors.md (``python -m benchmarks.detectors``).
"""
