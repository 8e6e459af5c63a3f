"""Benchmark of TTD against a contrastive step: time, memory, counted operations, and their growth."""
