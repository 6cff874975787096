"""Real detectors and backbones, each built offline and taken through one contract."""
