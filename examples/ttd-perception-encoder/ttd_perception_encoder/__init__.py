"""Adapter of ttd-plugins for Perception Encoder (PE-Core) in open_clip."""
